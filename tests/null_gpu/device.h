// What the parts of the null GPU share.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>
#include <string>

#define API extern "C" __attribute__((visibility("default")))

// Something that a stream was asked to do. Copies are carried out; kernels do nothing.
struct Operation {
    std::string kind;  // kernel, copy, fill, graph, sync, alloc, capture, collective
    std::string name;
    size_t bytes = 0;
    void* destination = nullptr;
    const void* source = nullptr;
};

extern std::recursive_mutex lock;  // of everything that threads share
extern thread_local int current_device;

// Records `operation` in the stream's capture, if any, else in the list of what was done. Null: the default stream.
cudaError_t submit(cudaStream_t stream, const Operation& operation);

// The device whose memory is at `pointer`; -1: the host's.
int device_of(const void* pointer);
