"""Values are those at the call, whatever training does to the state in the moment behind it.

A random state (types, sizes, views, small and large, a model with its optimizer) is saved on a
random stream, with copies taken by ``clone()`` just before. At once it is changed in place on this
stream or another, freed and its memory given to new tensors that are written, stepped by the
optimizer, changed by replays of a CUDA graph or by a compiled step. Then the step is restored into
fresh tensors and every bit is compared. All of it comes from ``--seed``: a failure names the round,
and a run with that seed makes the same calls again.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.gpu.bench import Bench, bits_of, opened, ram, saved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import mtckpt

_MODES = ("", "snapshot", "snapshot-overlap", "overlap", "blocking")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
_USUAL_MIB = 512
_LIMIT_S = 80.0  # for all modes together
_STREAMS = 3
_Drawn = tuple[torch.dtype, tuple[int, ...], str]


def measure(bench: Bench) -> None:
    modes = _MODES if bench.on_gpu else _MODES[:1]  # the host's memory is captured in one way
    end_s = max(0.0, bench.left_s() - _LIMIT_S)
    for number, mode in enumerate(modes):
        share_s = max(3.0, (bench.left_s() - end_s) / (len(modes) - number))
        name = f"stress, capture {mode or 'as it comes'}"
        bench.attempt(name, _mode, bench, name, mode, bench.left_s() - share_s, needs_s=3)


def _mode(bench: Bench, name: str, mode: str, until_left_s: float) -> None:
    tier = ram(mode, slots=3)
    seed = bench.chosen.seed
    rounds, compared = 0, 0
    with opened(tier, "stress") as checkpointer:
        scene = Scene(bench, random.Random(f"{seed} {mode}"), spares_model="overlap" in mode)
        while rounds < 10 * bench.rounds and (bench.left_s() > until_left_s or not rounds):
            rounds += 1
            try:
                compared += scene.round(checkpointer, rounds)
            except RuntimeError as error:
                raise RuntimeError(f"round {rounds}, seed {seed}: {error}") from error
    hits = dict(sorted(scene.hits.items()))
    facts = {"rounds": rounds, "compared_bytes": compared, "seed": seed, "hits": hits}
    bench.row(f"{name}: rounds with other bits", [0.0] * rounds, unit="", **facts)


class Scene:
    """A training job of random tensors. ``hits`` counts what was done behind saves.

    ``spares_model``: the model and its moments change by the optimizer's step alone, which is what
    the overlap mode asks for.
    """

    def __init__(self, bench: Bench, dice: random.Random, *, spares_model: bool) -> None:
        self.bench = bench
        self.dice = dice
        self.hits: dict[str, int] = {}
        self._spares_model = spares_model
        self._generator = torch.Generator(bench.device).manual_seed(dice.randrange(2**31))
        new_stream: Any = torch.cuda.Stream
        self._streams = [new_stream() for _ in range(_STREAMS)] if bench.on_gpu else []
        self.model, self.optimizer = self._new_model()
        self._shapes = self._draw_shapes(bench.size_mib(_USUAL_MIB) << 20)
        self.loose = self._new_loose()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._targets: list[torch.Tensor] = []  # of the graph
        self._replaced: list[object] = []  # graphs that may still run
        self._compiled: Callable[[], object] | None = None

    # -- state -----------------------------------------------------------------------------------

    def _new_model(self) -> tuple[nn.Module, torch.optim.AdamW]:
        width = 1024 if self.bench.on_gpu else 32
        with torch.device(self.bench.device):
            model = nn.Sequential(
                nn.Linear(width, width), nn.BatchNorm1d(width), nn.GELU(), nn.Linear(width, width)
            )
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    def _draw_shapes(self, size_bytes: int) -> list[_Drawn]:
        """Half of the bytes in a few tensors, half in tensors of all sizes, odd ones among them."""
        dice = self.dice
        large: _Drawn = (torch.float32, (size_bytes // 8 // 4 // 64, 64), "plain")
        drawn, left = [large] * 4, size_bytes // 2
        while left > 0 and len(drawn) < 400:
            dtype = dice.choice(_DTYPES)
            shape = tuple(dice.choice((1, 3, 8, 65, 512)) for _ in range(dice.randrange(4)))
            kind = dice.choice(("plain", "plain", "transposed", "part"))
            if torch.Size(shape).numel() < size_bytes // 32:
                drawn.append((dtype, shape, kind if len(shape) > 1 else "plain"))
                left -= 4 * torch.Size(shape).numel()
        return drawn

    def _new_loose(self) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for number, (dtype, shape, kind) in enumerate(self._shapes):
            tensor = torch.zeros(shape, dtype=dtype, device=self.bench.device)
            if kind == "transposed":
                tensor = torch.zeros(shape[::-1], dtype=dtype, device=self.bench.device)
                tensor = tensor.permute(*range(len(shape))[::-1])
            elif kind == "part":
                longer = (shape[0] + 2, *shape[1:])
                tensor = torch.zeros(longer, dtype=dtype, device=self.bench.device)[1:-1]
            made[f"t{number:03}"] = tensor
        return made

    def _tensors(self, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        found = dict(state["loose"])
        found |= {f"model.{name}": value for name, value in state["model"].state_dict().items()}
        for number, kept in enumerate(state["optimizer"].state.values()):
            found |= {f"optimizer.{number}.{k}": v for k, v in kept.items() if torch.is_tensor(v)}
        return found

    def state(self) -> dict[str, Any]:
        return {"loose": self.loose, "model": self.model, "optimizer": self.optimizer}

    def _fresh(self) -> dict[str, Any]:
        model, optimizer = self._new_model()
        return {"loose": self._new_loose(), "model": model, "optimizer": optimizer}

    # -- a round ---------------------------------------------------------------------------------

    def round(self, checkpointer: mtckpt.Checkpointer, number: int) -> int:
        """Several saves with something behind each; the last is compared. Returns its bytes."""
        if self._graph is None and self.bench.on_gpu:
            self._graph = self._captured()
        saves = self.dice.choice((1, 1, 2, 3))
        for count in range(saves):
            with self._on_a_stream():
                self._train()
                wanted = bits_of(self._tensors(self.state()))
                step = 10 * number + count
                save = saved(checkpointer, step, self.state())
                for _ in range(self.dice.randrange(1, 5)):
                    self._spoil()
            if self.dice.random() < 0.5:
                save.wait("staged", timeout_s=60)
        save.wait("staged", timeout_s=60)
        fresh = self._fresh()
        restored = checkpointer.restore(fresh, step=step)
        if restored.step != step:
            raise RuntimeError(f"{restored!r} where step {step} was saved")
        self.bench.sync()
        self._replaced.clear()
        found = bits_of(self._tensors(fresh))
        if found.keys() != wanted.keys():
            raise RuntimeError(f"other tensors: {sorted(found.keys() ^ wanted.keys())[:5]}")
        wrong = [name for name in wanted if not wanted[name].equal(found[name])]
        if wrong:
            raise RuntimeError(f"step {step}: {len(wrong)} tensors have other bits: {wrong[:5]}")
        return sum(bits.nbytes for bits in wanted.values())

    @contextlib.contextmanager
    def _on_a_stream(self) -> Iterator[None]:
        """The current stream, or one of our own, each waiting for the other as it has to."""
        if not self._streams or self.dice.random() < 0.4:
            yield
            return
        stream, outer = self.dice.choice(self._streams), torch.cuda.current_stream()
        stream.wait_stream(outer)
        with torch.cuda.stream(stream):
            yield
        outer.wait_stream(stream)
        for tensor in self._tensors(self.state()).values():
            tensor.record_stream(outer)

    def _train(self) -> None:
        width = self.model[0].in_features  # type: ignore[index]  # a Sequential
        batch = torch.randn(64, width, device=self.bench.device, generator=self._generator)
        self.optimizer.zero_grad(set_to_none=True)
        self.model(batch).square().mean().backward()
        self.optimizer.step()
        for tensor in self.loose.values():
            self._scribble(tensor)

    # -- what happens behind a save --------------------------------------------------------------

    def _spoil(self) -> None:
        ways = [self._in_place, self._elsewhere, self._freed, self._train]
        if self._graph is not None:
            ways.append(self._replayed)
        if self._compiled is not None or self._may_compile():
            ways.append(self._compiled_step)
        way = self.dice.choice(ways)
        name = way.__name__.strip("_")
        self.hits[name] = self.hits.get(name, 0) + 1
        way()

    def _may_compile(self) -> bool:
        return bool(self.bench.on_gpu and self.bench.chosen.compile and self.bench.left_s() > 90)

    def _scribble(self, tensor: torch.Tensor) -> None:
        if tensor.dtype == torch.bool:
            tensor.logical_not_()
        elif tensor.is_floating_point():
            tensor.normal_(generator=self._generator)
        else:
            tensor.random_(0, 100, generator=self._generator)

    def _in_place(self) -> None:
        for tensor in self.loose.values():
            self._scribble(tensor)
        if not self._spares_model:
            with torch.no_grad():
                for value in self.model.state_dict().values():
                    self._scribble(value)

    def _elsewhere(self) -> None:
        """In place on another stream, which waits for this one first, as it has to."""
        if not self._streams:
            self._in_place()
            return
        stream, mine = self.dice.choice(self._streams), torch.cuda.current_stream()
        stream.wait_stream(mine)
        with torch.cuda.stream(stream):
            self._in_place()
        mine.wait_stream(stream)

    def _freed(self) -> None:
        """Everything loose is dropped, and its memory goes to tensors that are written at once."""
        sizes = [tensor.nbytes for tensor in self.loose.values()]
        self._replaced.append(self._graph)
        self._graph, self._targets, self.loose = None, [], {}
        for size in sizes:  # equal sizes: the allocator gives the very same blocks
            torch.full((size,), 0xA5, dtype=torch.uint8, device=self.bench.device)
        self.loose = self._new_loose()
        for tensor in self.loose.values():
            self._scribble(tensor)
        if not self._spares_model:
            self.model, self.optimizer = self._new_model()
            self._train()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """A graph that writes to the loose float32 tensors; a save may drain while it is made."""
        self._targets = [t for t in self.loose.values() if t.dtype == torch.float32]
        for tensor in self._targets:  # loads the kernels, which a capture must not
            tensor.mul_(0.5).add_(1.0)
        graph = torch.cuda.CUDAGraph()
        # As PyTorch advises where other threads speak to the device, too.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for tensor in self._targets:
                tensor.mul_(0.5).add_(1.0)
        return graph

    def _replayed(self) -> None:
        assert self._graph is not None
        self._graph.replay()

    def _compiled_step(self) -> None:
        """A step that was compiled, which takes its time the first time."""
        if self._compiled is None:

            def update(tensors: list[torch.Tensor]) -> None:
                for tensor in tensors:
                    tensor.sin_().add_(1.0)

            compiled = torch.compile(update)
            try:
                compiled([torch.zeros_like(tensor) for tensor in list(self.loose.values())[:4]])
            except Exception as error:
                # Compilers fail in their own ways; without one there is one way less to change.
                self.bench.chosen.compile = 0
                self.hits[f"not compiled: {type(error).__name__}"] = 1
                self._in_place()
                return
            self._compiled = lambda: compiled(list(self.loose.values())[:4])
        self._compiled()
