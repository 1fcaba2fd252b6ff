// The CUDA runtime (libcudart) of a device whose kernels do nothing. Memory is the host's and copies are carried out at
// once; streams, events and captures keep CUDA's rules.
#include "device.h"

#include <execinfo.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <thread>
#include <unordered_map>
#include <vector>

std::recursive_mutex lock;
thread_local int current_device = 0;
using Guard = std::lock_guard<std::recursive_mutex>;

struct Stream;
using Clock = std::map<const Stream*, long>;  // how many operations of each stream have happened before

struct Capture {
    unsigned long long id;
    std::thread::id owner;
    cudaStreamCaptureMode mode;
    Stream* origin;
    std::vector<Operation>* nodes;
    bool invalid = false;
};

struct Stream {
    int device;
    int priority;
    Capture* capture = nullptr;
    long operations = 0;
    Clock before;
};

struct Event {
    unsigned long long capture = 0;  // id; 0: it was recorded outside of captures, or never
    bool recorded = false;
    Clock before;
};

static int number(const char* variable, int otherwise) {
    const char* value = getenv(variable);
    return value ? atoi(value) : otherwise;
}

static int number_of_devices() {
    int there = number("NULLGPU_COUNT", 1);
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    if (!visible) return there;
    int named = *visible ? 1 : 0;
    for (const char* c = visible; *c; c++) named += *c == ',';
    return std::min(there, named);
}

static int capability() { return number("NULLGPU_CAPABILITY", 90); }
static size_t total_memory() { return (size_t)number("NULLGPU_GIB", 140) << 30; }

static thread_local cudaError_t last_error = cudaSuccess;
static cudaError_t failed(cudaError_t error) {
    if (error) last_error = error;
    return error;
}

// ---------------------------------------------------------------------------------------------------------------------
// What was done

static std::string trace;  // lines: kind, name, bytes, device
static std::set<int> contexts;

static void create_context() {
    Guard guard(lock);
    contexts.insert(current_device);
}
API int nullgpu_has_context(int device) {
    Guard guard(lock);
    return contexts.count(device);
}

static void note(const Operation& operation) {
    Guard guard(lock);
    create_context();
    trace += operation.kind + "\t" + operation.name + "\t" + std::to_string(operation.bytes) + "\t" +
             std::to_string(current_device) + "\n";
}

// For tests, by ctypes: what was done since the last call.
API const char* nullgpu_take() {
    static std::string taken;
    Guard guard(lock);
    taken.swap(trace);
    trace.clear();
    return taken.c_str();
}

// ---------------------------------------------------------------------------------------------------------------------
// Rules of captures

static std::set<Stream*> streams;
static std::vector<Capture*> captures;  // those that are going on
static unsigned long long captures_so_far = 0;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static Stream* stream_of(cudaStream_t s) { return (size_t)s < 16 ? nullptr : (Stream*)s; }  // 0, 1, 2: default streams
static Capture* capture_of(cudaStream_t s) { return stream_of(s) ? stream_of(s)->capture : nullptr; }
static Capture* going_on(unsigned long long id) {
    for (auto c : captures)
        if (c->id == id) return c;
    return nullptr;
}

static cudaError_t refuse(Capture* capture, const char* call, cudaError_t error) {
    if (capture) capture->invalid = true;
    fprintf(stderr, "[null GPU] not permitted while a stream is capturing: %s\n", call);
    if (getenv("NULLGPU_STACK")) {
        void* frames[60];
        backtrace_symbols_fd(frames, backtrace(frames, 60), 2);
    }
    return failed(error);
}

// Calls that CUDA calls potentially unsafe: the thread that captures may not make them, and in global mode no other.
static cudaError_t check_safe(const char* call) {
    Guard guard(lock);
    if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    for (auto c : captures) {
        bool own = c->owner == std::this_thread::get_id();
        bool both_global = thread_mode == cudaStreamCaptureModeGlobal && c->mode == cudaStreamCaptureModeGlobal;
        if (own ? c->mode != cudaStreamCaptureModeRelaxed : both_global)
            return refuse(c, call, cudaErrorStreamCaptureUnsupported);
    }
    return cudaSuccess;
}
#define SAFE_ONLY(call) \
    if (cudaError_t error = check_safe(call)) return error

cudaError_t submit(cudaStream_t s, const Operation& operation) {
    Guard guard(lock);
    Stream* stream = stream_of(s);
    if (stream && stream->device != current_device && operation.kind == "kernel")
        return failed(cudaErrorInvalidResourceHandle);
    if (stream) stream->operations++;
    if (Capture* capture = capture_of(s))
        capture->nodes->push_back(operation);
    else
        note(operation);
    return cudaSuccess;
}

static void merge(Clock& into, const Clock& from) {
    for (auto& [stream, count] : from) into[stream] = std::max(into[stream], count);
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels: their names come from the calls that torch's libraries make when they are loaded

static std::unordered_map<const void*, std::string>& kernel_names() {
    static auto* names = new std::unordered_map<const void*, std::string>;
    return *names;
}
API void** __cudaRegisterFatBinary(void*) {
    static void* handle[2];
    return handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                int*) {
    Guard guard(lock);
    kernel_names()[host] = name;
}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API char __cudaInitModule(void**) { return 1; }

// <<<grid, block, shared, stream>>> pushes, the stub that the compiler made pops and launches.
struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
static thread_local std::vector<Configuration> configurations;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    Configuration top = configurations.back();
    configurations.pop_back();
    *grid = top.grid, *block = top.block, *shared = top.shared, *(cudaStream_t*)stream = top.stream;
    return cudaSuccess;
}

static cudaError_t launch(const void* function, dim3 grid, cudaStream_t s) {
    Guard guard(lock);
    if (!grid.x || !grid.y || !grid.z) return failed(cudaErrorInvalidConfiguration);
    auto found = kernel_names().find(function);
    return submit(s, {"kernel", found == kernel_names().end() ? "unknown" : found->second});
}
API cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3, void**, size_t, cudaStream_t s) {
    return launch(f, grid, s);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3, void**, size_t, cudaStream_t s) {
    return launch((const void*)f, grid, s);
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* f) {
    *kernel = (cudaKernel_t)f;
    return cudaSuccess;
}
API cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 grid, dim3, void**, size_t, cudaStream_t s) {
    return launch(f, grid, s);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void**) {
    return launch(f, c->gridDim, c->stream);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->maxDynamicSharedSizeBytes = 232448;
    a->binaryVersion = a->ptxVersion = capability();
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
    *blocks = 2;
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                                       unsigned) {
    *blocks = 2;
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Devices: all are as an H200

API cudaError_t cudaGetDeviceCount(int* n) {
    *n = number_of_devices();
    return *n ? cudaSuccess : failed(cudaErrorNoDevice);
}
API cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device) {  // creates the context, since CUDA 12
    if (device < 0 || device >= number_of_devices()) return failed(cudaErrorInvalidDevice);
    current_device = device;
    create_context();
    return cudaSuccess;
}

static cudaError_t properties(cudaDeviceProp* p, int device) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "Null GPU (as NVIDIA H200)");
    p->major = capability() / 10, p->minor = capability() % 10;
    p->totalGlobalMem = total_memory();
    p->multiProcessorCount = 132, p->maxBlocksPerMultiProcessor = 32, p->warpSize = 32;
    p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
    p->reservedSharedMemPerBlock = 1024;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = p->memPitch = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = 50 << 20, p->memoryBusWidth = 6144, p->textureAlignment = 512, p->texturePitchAlignment = 32;
    p->asyncEngineCount = 3, p->pciBusID = device + 1, p->uuid.bytes[0] = device + 1;
    p->unifiedAddressing = p->concurrentKernels = p->managedMemory = p->cooperativeLaunch = p->canMapHostMemory = 1;
    p->globalL1CacheSupported = p->streamPrioritiesSupported = p->memoryPoolsSupported = 1;
#if CUDART_VERSION < 13000
    p->clockRate = 1980000, p->memoryClockRate = 3201000;
#endif
    return cudaSuccess;
}
#undef cudaGetDeviceProperties
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) { return properties(p, device); }
API cudaError_t cudaGetDeviceProperties_v2(cudaDeviceProp* p, int device) { return properties(p, device); }

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    properties(&p, device);
    const std::map<cudaDeviceAttr, int> values = {
        {cudaDevAttrComputeCapabilityMajor, p.major},
        {cudaDevAttrComputeCapabilityMinor, p.minor},
        {cudaDevAttrMultiProcessorCount, p.multiProcessorCount},
        {cudaDevAttrMaxBlocksPerMultiprocessor, p.maxBlocksPerMultiProcessor},
        {cudaDevAttrWarpSize, p.warpSize},
        {cudaDevAttrMaxThreadsPerBlock, p.maxThreadsPerBlock},
        {cudaDevAttrMaxThreadsPerMultiProcessor, p.maxThreadsPerMultiProcessor},
        {cudaDevAttrMaxSharedMemoryPerBlock, (int)p.sharedMemPerBlock},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, (int)p.sharedMemPerBlockOptin},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, (int)p.sharedMemPerMultiprocessor},
        {cudaDevAttrMaxRegistersPerBlock, p.regsPerBlock},
        {cudaDevAttrMaxBlockDimX, p.maxThreadsDim[0]},
        {cudaDevAttrMaxBlockDimY, p.maxThreadsDim[1]},
        {cudaDevAttrMaxBlockDimZ, p.maxThreadsDim[2]},
        {cudaDevAttrMaxGridDimX, p.maxGridSize[0]},
        {cudaDevAttrMaxGridDimY, p.maxGridSize[1]},
        {cudaDevAttrMaxGridDimZ, p.maxGridSize[2]},
        {cudaDevAttrL2CacheSize, p.l2CacheSize},
        {cudaDevAttrClockRate, 1980000},
        {cudaDevAttrCooperativeLaunch, 1},
        {cudaDevAttrUnifiedAddressing, 1},
    };
    auto found = values.find(attribute);
    *value = found == values.end() ? 0 : found->second;
    return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
    snprintf(text, size, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0, *greatest = -5;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
    *pool = (cudaMemPool_t)1;
    return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
API cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
API cudaError_t cudaPeekAtLastError() { return last_error; }
API const char* cudaGetErrorName(cudaError_t error) { return error ? "an error" : "cudaSuccess"; }
API const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorInvalidResourceHandle: return "invalid resource handle";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
        case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
        case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
        case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
        default: return "error of the null GPU";
    }
}
API cudaError_t cudaDeviceSynchronize() {
    SAFE_ONLY("cudaDeviceSynchronize");
    return submit(nullptr, {"sync", "device"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory: pages of the host that are zero, and take no room until they are written

struct Block {
    size_t size;
    int device;
};
using Blocks = std::map<char*, Block>;
static Blocks device_memory, pinned_memory;
static std::map<int, size_t> used;  // bytes, by device

static const Block* find(const Blocks& blocks, const void* p) {
    auto next = blocks.upper_bound((char*)p);
    if (next == blocks.begin()) return nullptr;
    auto& [start, block] = *--next;
    return (char*)p < start + block.size ? &block : nullptr;
}
int device_of(const void* p) {
    Guard guard(lock);
    const Block* block = find(device_memory, p);
    return block ? block->device : -1;
}
static size_t mapped(size_t size) { return size + 4096; }
static void* map_pages(size_t size) {
    return mmap(nullptr, mapped(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
static void unmap(Blocks& blocks, void* p) {
    auto found = blocks.find((char*)p);
    if (found == blocks.end()) return;
    munmap(p, mapped(found->second.size));
    blocks.erase(found);
}

API cudaError_t cudaMalloc(void** p, size_t size) {
    SAFE_ONLY("cudaMalloc");
    Guard guard(lock);
    if (used[current_device] + size > total_memory()) {
        *p = nullptr;
        return failed(cudaErrorMemoryAllocation);
    }
    *p = map_pages(size);
    used[current_device] += size;
    device_memory[(char*)*p] = {size, current_device};
    note({"alloc", "device", size});
    return cudaSuccess;
}
API cudaError_t cudaFree(void* p) {
    SAFE_ONLY("cudaFree");
    Guard guard(lock);
    if (const Block* block = find(device_memory, p)) used[block->device] -= block->size;
    unmap(device_memory, p);
    return cudaSuccess;
}
API cudaError_t cudaMallocAsync(void** p, size_t size, cudaStream_t) { return cudaMalloc(p, size); }
API cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
API cudaError_t cudaHostAlloc(void** p, size_t size, unsigned) {
    SAFE_ONLY("cudaHostAlloc");
    Guard guard(lock);
    *p = map_pages(size);
    pinned_memory[(char*)*p] = {size, current_device};
    note({"alloc", "pinned", size});
    return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* p) {
    SAFE_ONLY("cudaFreeHost");
    Guard guard(lock);
    unmap(pinned_memory, p);
    return cudaSuccess;
}
API cudaError_t cudaHostRegister(void* p, size_t size, unsigned) {
    Guard guard(lock);
    pinned_memory[(char*)p] = {size, current_device};
    return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* p) {
    Guard guard(lock);
    pinned_memory.erase((char*)p);
    return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    Guard guard(lock);
    create_context();
    *total = total_memory(), *free = *total - used[current_device];
    return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
    Guard guard(lock);
    memset(a, 0, sizeof *a);
    const Block *on_device = find(device_memory, p), *pinned = find(pinned_memory, p);
    a->type = on_device ? cudaMemoryTypeDevice : pinned ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    a->device = on_device ? on_device->device : pinned ? pinned->device : -2;
    if (on_device || pinned) a->devicePointer = (void*)p;
    if (pinned) a->hostPointer = (void*)p;
    return cudaSuccess;
}

static Operation copy_of(void* to, const void* from, size_t size) {
    Guard guard(lock);
    auto place = [](const void* p) {
        return find(device_memory, p) ? "device" : find(pinned_memory, p) ? "pinned" : "host";
    };
    return {"copy", std::string(place(from)) + " to " + place(to), size, to, from};
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t s) {
    if (!capture_of(s)) memmove(to, from, size);
    return submit(s, copy_of(to, from, size));
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
    SAFE_ONLY("cudaMemcpy");
    submit(nullptr, {"sync", "cudaMemcpy"});
    return cudaMemcpyAsync(to, from, size, kind, nullptr);
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t s) {
    return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, s);
}
API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                  size_t height, cudaMemcpyKind kind, cudaStream_t s) {
    for (size_t row = 0; row < height; row++)
        cudaMemcpyAsync((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width, kind, s);
    return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
    SAFE_ONLY("cudaMemcpyToSymbol");
    return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t s) {
    if (!capture_of(s)) memset(p, value, size);
    return submit(s, {"fill", "memset", size});
}
API cudaError_t cudaMemset(void* p, int value, size_t size) {
    SAFE_ONLY("cudaMemset");
    return cudaMemsetAsync(p, value, size, nullptr);
}
API cudaError_t cudaGetSymbolAddress(void** p, const void*) {
    static char room[1 << 16];
    *p = room;
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams and events

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int priority) {
    Guard guard(lock);
    create_context();
    *s = (cudaStream_t)*streams.insert(new Stream{current_device, priority}).first;
    return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
    return cudaStreamCreateWithPriority(s, flags, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t s) {
    Guard guard(lock);
    streams.erase((Stream*)s);  // not freed: clocks may name it
    return cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t s, int* priority) {
    *priority = stream_of(s) ? stream_of(s)->priority : 0;
    return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    Guard guard(lock);
    if (auto c = capture_of(s)) return refuse(c, "cudaStreamSynchronize", cudaErrorStreamCaptureUnsupported);
    SAFE_ONLY("cudaStreamSynchronize");
    return submit(s, {"sync", "stream"});
}
API cudaError_t cudaStreamQuery(cudaStream_t s) {
    Guard guard(lock);
    auto c = capture_of(s);
    return c ? refuse(c, "cudaStreamQuery", cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
// A stream that waits for an event of a capture joins it.
API cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
    Guard guard(lock);
    Event* event = (Event*)e;
    Stream* stream = stream_of(s);
    Capture *mine = capture_of(s), *other = going_on(event->capture);
    if (!event->recorded) return cudaSuccess;
    if (mine && mine != other)
        return refuse(mine, "waiting for an event from outside of the capture", cudaErrorStreamCaptureIsolation);
    if (other && !stream) return refuse(other, "the default stream joins the capture", cudaErrorStreamCaptureImplicit);
    if (stream) stream->capture = other;
    if (stream) merge(stream->before, event->before);
    return cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
    create_context();
    *e = (cudaEvent_t) new Event;
    return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t e) {
    delete (Event*)e;
    return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    Guard guard(lock);
    Event* event = (Event*)e;
    *event = {capture_of(s) ? capture_of(s)->id : 0, true, {}};
    if (Stream* stream = stream_of(s)) {
        event->before = stream->before;
        event->before[stream] = stream->operations;
    }
    return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
API cudaError_t cudaEventQuery(cudaEvent_t e) {
    Guard guard(lock);
    if (auto id = ((Event*)e)->capture) return refuse(going_on(id), "cudaEventQuery", cudaErrorCapturedEvent);
    SAFE_ONLY("cudaEventQuery");
    return cudaSuccess;
}
API cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    Guard guard(lock);
    if (auto id = ((Event*)e)->capture) return refuse(going_on(id), "cudaEventSynchronize", cudaErrorCapturedEvent);
    SAFE_ONLY("cudaEventSynchronize");
    return submit(nullptr, {"sync", "event"});
}
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = 0.05f;
    return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t function, void* argument) {
    if (!capture_of(s)) function(argument);
    return submit(s, {"kernel", "host function"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Captures and graphs; a graph is a list of operations

using Nodes = std::vector<Operation>;

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, thread_mode);
    return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode) {
    Guard guard(lock);
    Stream* origin = stream_of(s);
    if (!origin || origin->capture) return failed(cudaErrorStreamCaptureUnsupported);
    origin->capture = new Capture{++captures_so_far, std::this_thread::get_id(), mode, origin, new Nodes};
    captures.push_back(origin->capture);
    return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
    Guard guard(lock);
    Capture* capture = capture_of(s);
    *graph = nullptr;
    if (!capture) return failed(cudaErrorIllegalState);
    bool joined = true;
    for (auto stream : streams)
        if (stream->capture == capture) {
            stream->capture = nullptr;
            joined &= stream == capture->origin || capture->origin->before[stream] >= stream->operations;
        }
    std::erase(captures, capture);
    if (capture->invalid) return failed(cudaErrorStreamCaptureInvalidated);
    if (!joined) return failed(cudaErrorStreamCaptureUnjoined);
    note({"capture", "graph", capture->nodes->size()});
    *graph = (cudaGraph_t)capture->nodes;
    return cudaSuccess;
}
static cudaStreamCaptureStatus status(const Capture* capture) {
    if (!capture) return cudaStreamCaptureStatusNone;
    return capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* out) {
    Guard guard(lock);
    *out = status(capture_of(s));
    return cudaSuccess;
}
static cudaError_t capture_info(cudaStream_t s, cudaStreamCaptureStatus* out, unsigned long long* id,
                                cudaGraph_t* graph = nullptr, size_t* dependencies = nullptr) {
    Guard guard(lock);
    Capture* capture = capture_of(s);
    *out = status(capture);
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture ? (cudaGraph_t)capture->nodes : nullptr;
    if (dependencies) *dependencies = 0;
    return cudaSuccess;
}
#if CUDART_VERSION >= 13000
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* out, unsigned long long* id,
                                         cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData**,
                                         size_t* dependencies) {
    if (nodes) *nodes = nullptr;
    return capture_info(s, out, id, graph, dependencies);
}
#else
#undef cudaStreamGetCaptureInfo
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* out, unsigned long long* id) {
    return capture_info(s, out, id);
}
API cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t s, cudaStreamCaptureStatus* out, unsigned long long* id,
                                            cudaGraph_t* graph, const cudaGraphNode_t** nodes, size_t* dependencies) {
    if (nodes) *nodes = nullptr;
    return capture_info(s, out, id, graph, dependencies);
}
#endif
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    *executable = (cudaGraphExec_t)graph;
    return cudaSuccess;
}
#if CUDART_VERSION < 13000
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(executable, graph, flags);
}
#endif
API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t s) {
    Nodes& nodes = *(Nodes*)executable;
    for (auto& node : nodes)
        if (node.kind == "copy") memmove(node.destination, node.source, node.bytes);
    return submit(s, {"graph", "launch", nodes.size()});
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
    *count = nodes ? 0 : ((Nodes*)graph)->size();
    return cudaSuccess;
}
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
    *object = (cudaUserObject_t)1;
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Functions of the driver that torch asks the runtime for; all others do nothing

static int driver_nothing() { return 0; }
static int driver_context_state(int device, unsigned* flags, int* active) {
    if (flags) *flags = 0;
    *active = nullgpu_has_context(device);
    return 0;
}
static int driver_current_context(void** context) {
    *context = (void*)0x10;
    return 0;
}
static int driver_device(int* device, int ordinal) {
    *device = ordinal;
    return 0;
}
static int driver_address_range(void** base, size_t* size, void* p) {
    Guard guard(lock);
    if (!find(device_memory, p)) return 1;
    auto& [start, block] = *std::prev(device_memory.upper_bound((char*)p));
    if (base) *base = start;
    if (size) *size = block.size;
    return 0;
}
static cudaError_t driver_entry(const std::string& name, void** function, cudaDriverEntryPointQueryResult* result) {
    const std::map<std::string, void*> known = {
        {"cuDevicePrimaryCtxGetState", (void*)driver_context_state},
        {"cuCtxGetCurrent", (void*)driver_current_context},
        {"cuDeviceGet", (void*)driver_device},
        {"cuMemGetAddressRange", (void*)driver_address_range},
    };
    auto found = known.find(name.substr(0, name.find("_v2")));
    *function = found == known.end() ? (void*)driver_nothing : found->second;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
    return driver_entry(name, function, result);
}
#if CUDART_VERSION < 13000
#undef cudaGetDriverEntryPoint
API cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                        cudaDriverEntryPointQueryResult* result) {
    return driver_entry(name, function, result);
}
#endif

// For the driver of the same process, see driver.cpp.
API void nullgpu_launch(cudaStream_t s, const char* name) { submit(s, {"kernel", name}); }
