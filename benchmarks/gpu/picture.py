"""Rows as a picture: bars beside their limits, one panel a unit. Plain SVG, no library.

Knows rows as ``measuring.line`` makes them; draws only figures that have a value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["draw"]

_WIDTH, _LABEL, _BAR, _GAP = 900, 330, 14, 8
_COLOURS = {"limit": "#b9c3cf", "figure": "#2f6fb0", "peer": "#c98a3a"}
_PEERS = ("DCP", "torch.save", "Orbax", "torch_checkpointing", "NVRx")


def draw(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Return the SVG."""
    parts: list[str] = [_text(10, 22, title, 15)]
    top = 44
    for unit, scale, shown in (("GiB/s", 1.0, "GiB/s"), ("s", 1e3, "ms")):
        chosen = [row for row in rows if row.get("unit") == unit and row["median"] > 0]
        chosen = [row for row in chosen if not str(row["figure"]).startswith("limit: device to d")]
        if chosen:
            top = _panel(parts, chosen, top, scale, shown)
    style = "font-family='sans-serif' fill='#222'"
    size = f"width='{_WIDTH}' height='{top}' viewBox='0 0 {_WIDTH} {top}'"
    body = "\n".join(parts)
    back = f"<rect width='{_WIDTH}' height='{top}' fill='white'/>"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} {style}>\n{back}\n{body}\n</svg>\n"


def _panel(
    parts: list[str], rows: Sequence[Mapping[str, Any]], top: int, scale: float, unit: str
) -> int:
    """One bar a row, the limit of the same run thin below it; returns where the next panel is."""
    parts.append(_text(10, top + 12, unit, 13))
    top += 24
    longest = max(_values(row, scale)[-1] for row in rows)
    for row in rows:
        name = str(row["figure"])
        value, limit = _values(row, scale)[:2]
        kind = "limit" if name.startswith("limit") else "figure"
        kind = "peer" if any(peer in name for peer in _PEERS) else kind
        parts.append(_text(10, top + 12, name, 11))
        parts.append(_rect(top, _BAR, value / longest, _COLOURS[kind]))
        if limit:
            parts.append(_rect(top + _BAR, 3, limit / longest, _COLOURS["limit"]))
        end = _LABEL + value / longest * (_WIDTH - _LABEL - 90)
        parts.append(_text(end + 4, top + 12, f"{value:.3g} {unit}", 11))
        top += _BAR + _GAP
    return top + 12


def _values(row: Mapping[str, Any], scale: float) -> tuple[float, float, float]:
    """The figure, its limit or 0, and the greater of the two."""
    value = float(row["median"]) * scale
    limit = float(row.get("limit", {}).get("median", 0.0)) * scale
    return value, limit, max(value, limit)


def _rect(top: float, height: float, share: float, colour: str) -> str:
    width = max(1.0, share * (_WIDTH - _LABEL - 90))
    return (
        f"<rect x='{_LABEL}' y='{top:.0f}' width='{width:.1f}' height='{height:.0f}' "
        f"fill='{colour}'/>"
    )


def _text(left: float, top: float, text: str, size: int) -> str:
    return f"<text x='{left:.0f}' y='{top:.0f}' font-size='{size}'>{escape(text)}</text>"
