// What the parts of the null GPU share: streams, captures, memory, and the list of what was done.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

// Something that a stream was asked to do. Copies are carried out; kernels do nothing.
struct Operation {
    std::string kind;  // kernel, copy, fill, graph, sync, alloc, capture, collective
    std::string name;
    size_t bytes = 0;
    void* destination = nullptr;
    const void* source = nullptr;
};

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

extern std::recursive_mutex lock;       // of everything here
extern thread_local int current_device;

int number_of_devices();
int capability();  // 90 is 9.0

// Called by whatever needs a context; the devices that have one can be asked for.
void create_context();
bool has_context(int device);

cudaError_t failed(cudaError_t error);  // remembers it for cudaGetLastError

// Records `operation` in the stream's capture, if any, else in the list of what was done. Null: the default stream.
cudaError_t submit(cudaStream_t stream, const Operation& operation);

// Whether memory at `pointer` is the device's, and which; -1: the host's.
int device_of(const void* pointer);
