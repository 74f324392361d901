// A CUDA driver without a device: what mtckpt calls of libcuda, on host memory.
//
// Device memory is host memory that nobody else may touch. Streams are queues that nothing empties
// but this: in mode 0 every call; in mode 1 (the default) a wait for something, and a question
// after something, which does one thing that it depends on; in mode 2 every call does a few things
// that could happen next, chosen by a seed. So what is read before its event was waited for is old.
// Ranges, handles and contexts are checked as strictly as the documentation allows a driver to;
// freeing or unregistering what queued work still uses spoils the context (error 700, for ever).
// The kernels are those of mtckpt/capture/kernels.cu, compiled for the host.

#include KERNELS

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100,
       INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NO_BINARY = 209, INVALID_HANDLE = 400,
       NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700, ALREADY_REGISTERED = 712,
       NOT_REGISTERED = 713, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };
const std::map<int, const char *> NAMES = {
    {0, "CUDA_SUCCESS"}, {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
    {3, "CUDA_ERROR_NOT_INITIALIZED"}, {100, "CUDA_ERROR_NO_DEVICE"},
    {101, "CUDA_ERROR_INVALID_DEVICE"}, {200, "CUDA_ERROR_INVALID_IMAGE"},
    {201, "CUDA_ERROR_INVALID_CONTEXT"}, {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {400, "CUDA_ERROR_INVALID_HANDLE"},
    {500, "CUDA_ERROR_NOT_FOUND"}, {600, "CUDA_ERROR_NOT_READY"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"}};

struct Stream;
struct Context {
    int ordinal, holders = 0;
};
// What an event stands for after it was recorded: done when every stream came past its part of it.
struct Mark {
    int remaining = 0;
    std::vector<Stream *> streams;
};
using Marked = std::shared_ptr<Mark>;
struct Op {
    std::function<void()> act;
    Marked waits_for, marks;
};
struct Stream {
    Context *context;
    std::deque<Op> queue;
    int capture = 0;  // 1: active, 2: invalidated
    int capture_mode = 0;
    bool destroyed = false;
};
struct Event {
    Context *context;
    Marked mark;
    bool captured = false;
};
struct Region {
    u64 size;
    int ordinal;  // -1: host
    enum Kind { OURS, ADOPTED, PINNED, REGISTERED } kind;
};
struct Function {
    int which;
};
struct Module {
    Context *context;
    std::string text;
    std::map<std::string, std::unique_ptr<Function>> functions;
};
struct Failure {
    std::string call;
    int code, skip, times;
};

std::recursive_mutex lock;
int num_devices = 2, mode = 1, sticky = OK, capability = 90;
long pid_of_init = 0;
u64 random_state = 1, total_bytes = 80ull << 30;
int flip_after = -1;
u64 copied_out = 0;
std::map<int, Context> contexts;
std::map<u64, Region> regions;
std::set<Stream *> streams;
std::map<Context *, Stream *> default_streams;
std::set<Event *> events;
std::set<Module *> modules;
std::vector<Failure> failures;
std::string call_log;
thread_local std::vector<Context *> stack;
thread_local int thread_mode = 0;

u64 rolled(u64 below) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % below;
}

// ------------------------------------------------------------------------------ doing what is queued

bool blocked(const Op &op) { return op.waits_for && op.waits_for->remaining > 0; }

void do_first(Stream *stream) {
    Op op = std::move(stream->queue.front());
    stream->queue.pop_front();
    if (op.act && sticky == OK) op.act();
    if (op.marks) --op.marks->remaining;
}

// Does one thing that the stream's first operation needs; false if there is nothing to do.
bool step(Stream *stream) {
    while (!stream->queue.empty()) {
        const Op &op = stream->queue.front();
        if (!blocked(op)) {
            do_first(stream);
            return true;
        }
        Stream *next = nullptr;
        for (Stream *other : op.waits_for->streams)
            for (const Op &there : other->queue)
                if (there.marks == op.waits_for) next = other;
        if (!next) std::abort();  // waits for what nobody will do
        stream = next;
    }
    return false;
}

void drain(Stream *stream) {
    while (step(stream)) {
    }
}

bool reached(const Marked &mark) { return !mark || mark->remaining == 0; }

void step_to(const Marked &mark) {
    for (Stream *stream : mark->streams)
        for (const Op &there : stream->queue)
            if (there.marks == mark) {
                step(stream);
                return;
            }
}

std::vector<Stream *> all_streams(Context *context = nullptr) {
    std::vector<Stream *> found;
    for (Stream *stream : streams)
        if (!context || stream->context == context) found.push_back(stream);
    return found;
}

void progress() {
    if (mode == 0)
        for (Stream *stream : all_streams()) drain(stream);
    if (mode == 2)
        for (u64 left = rolled(3); left > 0; --left) {
            auto all = all_streams();
            if (!all.empty()) step(all[rolled(all.size())]);
        }
}

// ---------------------------------------------------------------------------------- what is where

const Region *region_of(u64 address, u64 size) {
    auto next = regions.upper_bound(address);
    if (next == regions.begin()) return nullptr;
    --next;
    return address + size <= next->first + next->second.size ? &next->second : nullptr;
}

bool on_device(u64 address, u64 size) {
    const Region *region = region_of(address, size);
    return region && region->ordinal >= 0;
}

bool pinned(u64 address, u64 size) {
    const Region *region = region_of(address, size);
    return region && region->ordinal < 0;
}

u64 allocated(int ordinal) {
    u64 sum = 0;
    for (auto &[address, region] : regions)
        if (region.ordinal == ordinal && region.kind == Region::OURS) sum += region.size;
    return sum;
}

// ------------------------------------------------------------------------------------ the calls

// Of every call: what was told to fail, what a fork and a spoilt context do.
int entered(const char *call) {
    call_log += call;
    call_log += '\n';
    if (pid_of_init != getpid()) return NOT_INITIALIZED;
    for (Failure &failure : failures)
        if (failure.call == call && failure.times > 0) {
            if (failure.skip > 0) {
                --failure.skip;
                continue;
            }
            --failure.times;
            return failure.code;
        }
    progress();
    return sticky;
}

#define ENTER(call)                                   \
    std::lock_guard<std::recursive_mutex> held(lock); \
    if (int code = entered(call)) return code
#define NEED(condition, code) \
    if (!(condition)) return code
#define NEED_CONTEXT NEED(!stack.empty(), INVALID_CONTEXT)

// Calls that no thread may make while another one captures in the default mode.
int unsafe_while_capturing() {
    int code = OK;
    if (thread_mode == 0)
        for (Stream *stream : streams)
            if (stream->capture && stream->capture_mode == 0) {
                stream->capture = 2;
                code = CAPTURE_UNSUPPORTED;
            }
    return code;
}
#define SAFE \
    if (int code = unsafe_while_capturing()) return code

Stream *new_stream(Context *context) {
    Stream *stream = new Stream{context, {}};
    streams.insert(stream);
    return stream;
}

Stream *stream_of(void *handle) {
    if (handle > reinterpret_cast<void *>(2)) {
        Stream *stream = static_cast<Stream *>(handle);
        return streams.count(stream) && !stream->destroyed ? stream : nullptr;
    }
    if (stack.empty()) return nullptr;
    Stream *&found = default_streams[stack.back()];
    if (!found) found = new_stream(stack.back());
    return found;
}

int enqueue(Stream *stream, Op op) {
    if (stream->capture) return stream->capture == 2 ? CAPTURE_INVALIDATED : OK;
    stream->queue.push_back(std::move(op));
    progress();
    return OK;
}

void copy_now(u64 target, u64 source, u64 size, bool to_device, bool from_device, bool was_pinned) {
    const bool there = (!to_device || on_device(target, size)) &&
                       (!from_device || on_device(source, size)) &&
                       (!was_pinned || pinned(to_device ? source : target, size));
    if (!there) {
        sticky = ILLEGAL_ADDRESS;
        return;
    }
    std::memmove(reinterpret_cast<void *>(target), reinterpret_cast<void *>(source), size);
    if (to_device != from_device && size && flip_after >= 0 && flip_after-- == 0)
        reinterpret_cast<u8 *>(target)[size / 2] ^= 4;
}

int copy_async(u64 target, u64 source, u64 size, void *handle, bool to_device, bool from_device) {
    NEED_CONTEXT;
    Stream *stream = stream_of(handle);
    NEED(stream, INVALID_HANDLE);
    NEED(stream->context == stack.back(), INVALID_CONTEXT);
    NEED(!to_device || on_device(target, size), INVALID_VALUE);
    NEED(!from_device || on_device(source, size), INVALID_VALUE);
    const u64 host = to_device ? source : target;
    if (!to_device) copied_out += size;
    const bool only_device = to_device && from_device, is_pinned = !only_device && pinned(host, size);
    NEED(only_device || !on_device(host, 1), INVALID_VALUE);
    const int code = enqueue(stream, {[=] { copy_now(target, source, size, to_device, from_device, is_pinned); },
                                      nullptr, nullptr});
    if (code == OK && !only_device && !is_pinned && !stream->capture) drain(stream);
    return code == OK ? sticky : code;
}

const char *const KERNEL_NAMES[] = {"mtckpt_digest_copy", "mtckpt_gather", "mtckpt_verify",
                                    "mtckpt_place"};

void run_kernel(int which, std::vector<u64> arguments, u64 num_warps) {
    const u64 rows = arguments[0], num_rows = arguments[1];
    bool there = on_device(rows, num_rows * sizeof(Row));
    u64 last = 0;
    for (u64 i = 0; there && i < num_rows; ++i) {
        const Row row = row_at(rows, i);
        last = row.index > last ? row.index : last;
        there = on_device(row.source, row.size_bytes) &&
                (which == 2 || !row.target || on_device(row.target, row.size_bytes)) &&
                (which != 1 || row.target);
    }
    if (which != 1) there = there && on_device(arguments[2], 8 * (last + 1));
    if (which >= 2) there = there && on_device(arguments[3], last + 1);
    if (!there) {
        sticky = ILLEGAL_ADDRESS;
        return;
    }
    for (u64 warp = 0; warp < num_warps && warp < num_rows; ++warp) {
        host_row_number = warp;
        if (which == 0) mtckpt_digest_copy(rows, num_rows, arguments[2]);
        if (which == 1) mtckpt_gather(rows, num_rows);
        if (which == 2) mtckpt_verify(rows, num_rows, arguments[2], arguments[3]);
        if (which == 3) mtckpt_place(rows, num_rows, arguments[2], arguments[3]);
    }
}

}  // namespace

API int cuInit(unsigned) {
    std::lock_guard<std::recursive_mutex> held(lock);
    if (pid_of_init && pid_of_init != getpid()) return NOT_INITIALIZED;
    pid_of_init = getpid();
    if (int code = entered("cuInit")) return code;
    return num_devices ? OK : NO_DEVICE;
}

API int cuDriverGetVersion(int *version) {
    *version = 13000;
    return OK;
}

API int cuGetErrorName(int code, const char **text) {
    auto found = NAMES.find(code);
    *text = found == NAMES.end() ? nullptr : found->second;
    return found == NAMES.end() ? INVALID_VALUE : OK;
}

API int cuGetErrorString(int code, const char **text) {
    if (int failed = cuGetErrorName(code, text)) return failed;
    *text = "as the fake was told";
    return OK;
}

API int cuDeviceGetCount(int *count) {
    ENTER("cuDeviceGetCount");
    *count = num_devices;
    return OK;
}

API int cuDeviceGet(int *device, int ordinal) {
    ENTER("cuDeviceGet");
    NEED(ordinal >= 0 && ordinal < num_devices, INVALID_DEVICE);
    *device = ordinal + 70;  // a device is not its ordinal
    return OK;
}

API int cuDeviceGetName(char *name, int size, int device) {
    ENTER("cuDeviceGetName");
    std::snprintf(name, size, "Fake %d", device - 70);
    return OK;
}

API int cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER("cuDeviceGetAttribute");
    const std::map<int, int> values = {{16, 4}, {75, capability / 10}, {76, capability % 10},
                                       {33, 0x1b}, {34, device - 70}, {50, 0}};
    auto found = values.find(attribute);
    NEED(found != values.end(), INVALID_VALUE);
    *value = found->second;
    return OK;
}

API int cuDevicePrimaryCtxRetain(Context **context, int device) {
    ENTER("cuDevicePrimaryCtxRetain");
    const int ordinal = device - 70;
    NEED(ordinal >= 0 && ordinal < num_devices, INVALID_DEVICE);
    *context = &contexts[ordinal];
    (*context)->ordinal = ordinal;
    ++(*context)->holders;
    return OK;
}

API int cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER("cuDevicePrimaryCtxRelease_v2");
    auto found = contexts.find(device - 70);
    NEED(found != contexts.end() && found->second.holders > 0, INVALID_CONTEXT);
    --found->second.holders;
    return OK;
}

API int cuCtxPushCurrent_v2(Context *context) {
    ENTER("cuCtxPushCurrent_v2");
    NEED(context && context->holders > 0, INVALID_CONTEXT);
    stack.push_back(context);
    return OK;
}

API int cuCtxPopCurrent_v2(Context **context) {
    std::lock_guard<std::recursive_mutex> held(lock);
    const int code = entered("cuCtxPopCurrent_v2");
    NEED(code == OK || code == sticky, code);
    NEED_CONTEXT;
    *context = stack.back();
    stack.pop_back();
    return OK;
}

API int cuCtxGetStreamPriorityRange(int *lowest, int *highest) {
    ENTER("cuCtxGetStreamPriorityRange");
    NEED_CONTEXT;
    *lowest = 0;
    *highest = -5;
    return OK;
}

API int cuPointerGetAttribute(void *value, int attribute, u64 address) {
    ENTER("cuPointerGetAttribute");
    const Region *region = region_of(address, 1);
    NEED(region, INVALID_VALUE);
    NEED(attribute == 2 || attribute == 9, INVALID_VALUE);
    *static_cast<int *>(value) = attribute == 2  ? (region->ordinal < 0 ? 1 : 2)
                                 : region->ordinal < 0 ? 0 : region->ordinal;
    return OK;
}

API int cuMemGetInfo_v2(size_t *free, size_t *total) {
    ENTER("cuMemGetInfo_v2");
    NEED_CONTEXT;
    *total = total_bytes;
    *free = total_bytes - allocated(stack.back()->ordinal);
    return OK;
}

API int cuMemHostRegister_v2(void *address, size_t size, unsigned) {
    ENTER("cuMemHostRegister_v2");
    SAFE;
    NEED_CONTEXT;
    NEED(address && size, INVALID_VALUE);
    const u64 first = u64(address);
    for (auto &[other, region] : regions)
        if (other < first + size && first < other + region.size) return ALREADY_REGISTERED;
    regions[first] = {size, -1, Region::REGISTERED};
    return OK;
}

API int cuMemHostUnregister(void *address) {
    ENTER("cuMemHostUnregister");
    SAFE;
    auto found = regions.find(u64(address));
    NEED(found != regions.end() && found->second.kind == Region::REGISTERED, NOT_REGISTERED);
    regions.erase(found);
    return OK;
}

namespace {
int allocate(u64 *address, size_t size, int ordinal, Region::Kind kind) {
    SAFE;
    NEED_CONTEXT;
    NEED(size, INVALID_VALUE);
    NEED(ordinal < 0 || allocated(ordinal) + size <= total_bytes, OUT_OF_MEMORY);
    void *memory = nullptr;
    NEED(posix_memalign(&memory, 512, size) == 0, OUT_OF_MEMORY);
    std::memset(memory, 0xA5, size);
    *address = u64(memory);
    regions[*address] = {size, ordinal, kind};
    return OK;
}

int release(u64 address, Region::Kind kind) {
    SAFE;
    if (!address) return OK;
    auto found = regions.find(address);
    NEED(found != regions.end() && found->second.kind == kind, INVALID_VALUE);
    std::memset(reinterpret_cast<void *>(address), 0x5A, found->second.size);
    std::free(reinterpret_cast<void *>(address));
    regions.erase(found);
    return OK;
}
}  // namespace

API int cuMemAlloc_v2(u64 *address, size_t size) {
    ENTER("cuMemAlloc_v2");
    NEED_CONTEXT;
    return allocate(address, size, stack.back()->ordinal, Region::OURS);
}

API int cuMemFree_v2(u64 address) {
    ENTER("cuMemFree_v2");
    return release(address, Region::OURS);
}

API int cuMemHostAlloc(void **address, size_t size, unsigned) {
    ENTER("cuMemHostAlloc");
    u64 found = 0;
    const int code = allocate(&found, size, -1, Region::PINNED);
    *address = reinterpret_cast<void *>(found);
    return code;
}

API int cuMemFreeHost(void *address) {
    ENTER("cuMemFreeHost");
    return release(u64(address), Region::PINNED);
}

API int cuStreamCreateWithPriority(Stream **stream, unsigned, int) {
    ENTER("cuStreamCreateWithPriority");
    NEED_CONTEXT;
    *stream = new_stream(stack.back());
    return OK;
}

// What is queued is still done: the object stays until everything is reset.
API int cuStreamDestroy_v2(void *handle) {
    ENTER("cuStreamDestroy_v2");
    Stream *stream = stream_of(handle);
    NEED(stream && handle > reinterpret_cast<void *>(2), INVALID_HANDLE);
    stream->destroyed = true;
    return OK;
}

API int cuStreamQuery(void *handle) {
    ENTER("cuStreamQuery");
    SAFE;
    Stream *stream = stream_of(handle);
    NEED(stream, INVALID_HANDLE);
    step(stream);
    return sticky ? sticky : stream->queue.empty() ? OK : NOT_READY;
}

API int cuStreamSynchronize(void *handle) {
    ENTER("cuStreamSynchronize");
    SAFE;
    Stream *stream = stream_of(handle);
    NEED(stream, INVALID_HANDLE);
    drain(stream);
    return sticky;
}

API int cuStreamWaitEvent(void *handle, Event *event, unsigned) {
    ENTER("cuStreamWaitEvent");
    Stream *stream = stream_of(handle);
    NEED(stream && events.count(event), INVALID_HANDLE);
    if (event->captured) {
        if (!stream->capture) stream->capture = 1;  // joins the capture
        return OK;
    }
    return enqueue(stream, {nullptr, event->mark, nullptr});
}

API int cuStreamIsCapturing(void *handle, int *status) {
    ENTER("cuStreamIsCapturing");
    Stream *stream = stream_of(handle);
    NEED(stream, INVALID_HANDLE);
    *status = stream->capture;
    return OK;
}

API int cuThreadExchangeStreamCaptureMode(int *mode) {
    ENTER("cuThreadExchangeStreamCaptureMode");
    NEED(*mode >= 0 && *mode <= 2, INVALID_VALUE);
    std::swap(*mode, thread_mode);
    return OK;
}

API int cuEventCreate(Event **event, unsigned) {
    ENTER("cuEventCreate");
    NEED_CONTEXT;
    *event = new Event{stack.back(), nullptr};
    events.insert(*event);
    return OK;
}

API int cuEventDestroy_v2(Event *event) {
    ENTER("cuEventDestroy_v2");
    NEED(events.erase(event), INVALID_HANDLE);
    delete event;
    return OK;
}

namespace {
int record(Event *event, const std::vector<Stream *> &on) {
    auto mark = std::make_shared<Mark>();
    mark->remaining = int(on.size());
    mark->streams = on;
    event->mark = mark;
    event->captured = false;
    for (Stream *stream : on) stream->queue.push_back({nullptr, nullptr, mark});
    progress();
    return sticky;
}
}  // namespace

API int cuEventRecord(Event *event, void *handle) {
    ENTER("cuEventRecord");
    Stream *stream = stream_of(handle);
    NEED(stream && events.count(event) && event->context == stream->context, INVALID_HANDLE);
    if (stream->capture) {
        event->captured = true;
        return stream->capture == 2 ? CAPTURE_INVALIDATED : OK;
    }
    return record(event, {stream});
}

API int cuEventQuery(Event *event) {
    ENTER("cuEventQuery");
    SAFE;
    NEED(events.count(event), INVALID_HANDLE);
    NEED(!event->captured, CAPTURE_UNSUPPORTED);
    if (!reached(event->mark)) step_to(event->mark);
    return sticky ? sticky : reached(event->mark) ? OK : NOT_READY;
}

API int cuEventSynchronize(Event *event) {
    ENTER("cuEventSynchronize");
    SAFE;
    NEED(events.count(event), INVALID_HANDLE);
    NEED(!event->captured, CAPTURE_UNSUPPORTED);
    while (!reached(event->mark)) step_to(event->mark);
    return sticky;
}

API int cuMemcpyDtoHAsync_v2(void *target, u64 source, size_t size, void *stream) {
    ENTER("cuMemcpyDtoHAsync_v2");
    return copy_async(u64(target), source, size, stream, false, true);
}

API int cuMemcpyHtoDAsync_v2(u64 target, const void *source, size_t size, void *stream) {
    ENTER("cuMemcpyHtoDAsync_v2");
    return copy_async(target, u64(source), size, stream, true, false);
}

API int cuMemcpyDtoDAsync_v2(u64 target, u64 source, size_t size, void *stream) {
    ENTER("cuMemcpyDtoDAsync_v2");
    return copy_async(target, source, size, stream, true, true);
}

namespace {
// The bytes of an ELF file, and the compute capability that one with machine code is for.
struct Elf {
    u64 size;
    int capability;
};
Elf elf_at(const u8 *image) {
    const u64 at = u64(image);
    const u32 flags = load<u32>(at + 48);
    const u64 programs = load<u64>(at + 32) + u64(load<u16>(at + 54)) * load<u16>(at + 56);
    const u64 sections = load<u64>(at + 40) + u64(load<u16>(at + 58)) * load<u16>(at + 60);
    const bool is_newer = image[8] >= 8;  // the version of the ABI
    return {programs > sections ? programs : sections, int(is_newer ? flags >> 8 & 0xFF : flags & 0xFF)};
}
}  // namespace

API int cuModuleLoadData(Module **module, const void *image) {
    ENTER("cuModuleLoadData");
    NEED_CONTEXT;
    std::string text;
    if (std::memcmp(image, "\177ELF", 4) == 0) {
        const Elf elf = elf_at(static_cast<const u8 *>(image));
        const bool runs = elf.capability / 10 == capability / 10 && elf.capability <= capability;
        NEED(runs, NO_BINARY);
        text.assign(static_cast<const char *>(image), elf.size);
    } else {
        text = static_cast<const char *>(image);
        NEED(text.find(".version") != std::string::npos, INVALID_IMAGE);
    }
    *module = new Module{stack.back(), text, {}};
    modules.insert(*module);
    return OK;
}

API int cuModuleUnload(Module *module) {
    ENTER("cuModuleUnload");
    NEED(modules.erase(module), INVALID_HANDLE);
    delete module;
    return OK;
}

API int cuModuleGetFunction(Function **function, Module *module, const char *name) {
    ENTER("cuModuleGetFunction");
    NEED(modules.count(module), INVALID_HANDLE);
    const std::string &text = module->text;
    const std::string named(name, std::strlen(name) + 1);  // as a table of an ELF file has it
    NEED(text.find(".entry " + std::string(name) + "(") != std::string::npos ||
             (text[0] == '\177' && text.find('\0' + named) != std::string::npos), NOT_FOUND);
    for (int which = 0; which < 4; ++which)
        if (std::string(name) == KERNEL_NAMES[which]) {
            auto &made = module->functions[name];
            if (!made) made.reset(new Function{which});
            *function = made.get();
            return OK;
        }
    return NOT_FOUND;
}

API int cuLaunchKernel(Function *function, unsigned grid, unsigned grid_y, unsigned grid_z,
                       unsigned block, unsigned block_y, unsigned block_z, unsigned shared,
                       void *handle, void **parameters, void **extra) {
    ENTER("cuLaunchKernel");
    NEED_CONTEXT;
    Context *home = nullptr;
    for (Module *module : modules)
        for (auto &[name, made] : module->functions)
            if (made.get() == function) home = module->context;
    Stream *stream = stream_of(handle);
    NEED(home && stream && stream->context == home, INVALID_HANDLE);
    NEED(grid && grid_y == 1 && grid_z == 1 && block && block <= THREADS && block % 32 == 0 &&
             block_y == 1 && block_z == 1 && !shared && parameters && !extra, INVALID_VALUE);
    static const int counts[] = {3, 2, 4, 4};
    std::vector<u64> arguments;
    for (int i = 0; i < counts[function->which]; ++i)
        arguments.push_back(*static_cast<u64 *>(parameters[i]));
    const int which = function->which;
    const u64 warps = u64(grid) * block / 32;
    const int code =
        enqueue(stream, {[=] { run_kernel(which, arguments, warps); }, nullptr, nullptr});
    return code == OK ? sticky : code;
}

// ------------------------------------------------------------------------------- what tests say

// A driver that nobody has used, with so many devices. Memory that was not freed is given back.
API void fake_reset(int devices) {
    std::lock_guard<std::recursive_mutex> held(lock);
    for (auto &[address, region] : regions)
        if (region.kind == Region::OURS || region.kind == Region::PINNED)
            std::free(reinterpret_cast<void *>(address));
    regions.clear();
    for (Stream *stream : streams) delete stream;
    for (Event *event : events) delete event;
    for (Module *module : modules) delete module;
    streams.clear();
    events.clear();
    modules.clear();
    default_streams.clear();
    contexts.clear();
    failures.clear();
    call_log.clear();
    stack.clear();
    num_devices = devices;
    mode = 1;
    sticky = OK;
    thread_mode = 0;
    flip_after = -1;
    capability = 90;
    total_bytes = 80ull << 30;
    pid_of_init = 0;
}

API void fake_mode(int chosen, u64 seed) {
    std::lock_guard<std::recursive_mutex> held(lock);
    mode = chosen;
    random_state = seed * 2 + 1;
}

API void fake_memory(u64 size) {
    std::lock_guard<std::recursive_mutex> held(lock);
    total_bytes = size;
}

// What all devices are, as ten times the major number and the minor one.
API void fake_capability(int chosen) {
    std::lock_guard<std::recursive_mutex> held(lock);
    capability = chosen;
}

// The call fails with the code, ``times`` times after it went well ``skip`` times.
API void fake_fail(const char *call, int code, int skip, int times) {
    std::lock_guard<std::recursive_mutex> held(lock);
    failures.push_back({call, code, skip, times});
}

// One bit changes on the way in the copy over the bus that comes after ``skip`` others.
API void fake_flip(int skip) {
    std::lock_guard<std::recursive_mutex> held(lock);
    flip_after = skip;
}

// Bytes that were to be copied from devices to the host since the last time this was asked.
API u64 fake_copied_out() {
    std::lock_guard<std::recursive_mutex> held(lock);
    const u64 found = copied_out;
    copied_out = 0;
    return found;
}

// Host memory of somebody else that counts as a device's from now on; size 0: no longer.
API void fake_adopt(u64 address, u64 size, int ordinal) {
    std::lock_guard<std::recursive_mutex> held(lock);
    if (size)
        regions[address] = {size, ordinal, Region::ADOPTED};
    else
        regions.erase(address);
}

// The default stream or another one captures a graph (1), or no longer does (0).
API int fake_capture(void *handle, int status, int capture_mode) {
    std::lock_guard<std::recursive_mutex> held(lock);
    Stream *stream = stream_of(handle);
    NEED(stream, INVALID_HANDLE);
    const int before = stream->capture;
    stream->capture = status;
    stream->capture_mode = capture_mode;
    return before;
}

// Contexts held, device allocations, their bytes, pinned allocations, registrations, streams,
// events, modules, operations that are queued, contexts current in this thread.
API void fake_counts(u64 *counts) {
    std::lock_guard<std::recursive_mutex> held(lock);
    for (int i = 0; i < 10; ++i) counts[i] = 0;
    for (auto &[ordinal, context] : contexts) counts[0] += context.holders;
    for (auto &[address, region] : regions) {
        if (region.kind == Region::OURS) ++counts[1], counts[2] += region.size;
        if (region.kind == Region::PINNED) ++counts[3];
        if (region.kind == Region::REGISTERED) ++counts[4];
    }
    for (Stream *stream : streams) {
        bool is_default = false;
        for (auto &[context, other] : default_streams) is_default |= other == stream;
        if (!stream->destroyed && !is_default) ++counts[5];
        counts[8] += stream->queue.size();
    }
    counts[6] = events.size();
    counts[7] = modules.size();
    counts[9] = stack.size();
}

// The names of all calls since the last time, a line each; false if they do not fit.
API int fake_log(char *text, u64 size) {
    std::lock_guard<std::recursive_mutex> held(lock);
    if (call_log.size() + 1 > size) return 0;
    std::memcpy(text, call_log.c_str(), call_log.size() + 1);
    call_log.clear();
    return 1;
}
