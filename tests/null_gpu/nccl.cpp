// NCCL between processes of one machine: the tensors really travel, through a file in shared memory. A collective takes
// place when it is called, not when its stream reaches it, and ends the process if another one is missing.
#include "device.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

static const int MOST_RANKS = 8, PATIENCE = 60;  // seconds
static const size_t SLOT = 16 << 20;             // bytes of one rank that travel at once

struct Shared {
    std::atomic<int> arrived, round;
    char slots[MOST_RANKS][SLOT];
};
struct Communicator {
    int rank, ranks;
    Shared* shared;

    void wait_for_all() {
        int round = shared->round;
        if (++shared->arrived == ranks) {
            shared->arrived = 0;
            shared->round++;
        }
        for (long waited = 0; shared->round == round; waited += 100) {
            if (waited > PATIENCE * 1000000L) {
                fprintf(stderr, "[null GPU] rank %d waited for a collective in vain\n", rank);
                _exit(1);
            }
            usleep(100);
        }
    }
};
struct UniqueId {
    char path[128];
};

API int ncclGetUniqueId(UniqueId* id) {
    snprintf(id->path, sizeof id->path, "/dev/shm/null_gpu_XXXXXX");
    int file = mkstemp(id->path);
    bool made = file >= 0 && ftruncate(file, sizeof(Shared)) == 0;
    close(file);
    return made ? 0 : 2;  // 2: a system error
}
API int ncclCommInitRankConfig(Communicator** out, int ranks, UniqueId id, int rank, void*) {
    int file = open(id.path, O_RDWR);
    void* pages = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (pages == MAP_FAILED || ranks > MOST_RANKS) return 2;
    *out = new Communicator{rank, ranks, (Shared*)pages};
    (*out)->wait_for_all();
    if (rank == 0) unlink(id.path);
    return 0;
}
API int ncclCommInitRank(Communicator** out, int ranks, UniqueId id, int rank) {
    return ncclCommInitRankConfig(out, ranks, id, rank, nullptr);
}
API int ncclCommInitRankScalable(Communicator** out, int ranks, int rank, int, UniqueId* ids, void*) {
    return ncclCommInitRankConfig(out, ranks, ids[0], rank, nullptr);
}
static int end(Communicator* c) {
    munmap(c->shared, sizeof(Shared));
    delete c;
    return 0;
}
API int ncclCommDestroy(Communicator* c) { return end(c); }
API int ncclCommAbort(Communicator* c) { return end(c); }
API int ncclCommFinalize(Communicator*) { return 0; }
API int ncclCommGetAsyncError(Communicator*, int* error) { return *error = 0; }
API const char* ncclGetLastError(Communicator*) { return ""; }
API int ncclCommUserRank(Communicator* c, int* rank) {
    *rank = c->rank;
    return 0;
}
API int ncclCommCount(Communicator* c, int* ranks) {
    *ranks = c->ranks;
    return 0;
}
API int ncclCommCuDevice(Communicator*, int* device) {
    *device = current_device;
    return 0;
}
API int ncclCommRegister(Communicator*, void*, size_t, void** handle) {
    *handle = nullptr;
    return 0;
}
API int ncclCommDeregister(Communicator*, void*) { return 0; }
API int ncclGroupStart() { return 0; }
API int ncclGroupEnd() { return 0; }

// ---------------------------------------------------------------------------------------------------------------------
// Collectives

enum Type { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16 };
enum Reduction { SUM, PROD, MAX, MIN, AVG };

static size_t width(int type) {
    return type <= UINT8 ? 1 : type == FLOAT16 || type == BFLOAT16 ? 2 : type <= UINT32 || type == FLOAT32 ? 4 : 8;
}
template <typename T>
static void reduce(T* into, const T* other, size_t count, int reduction) {
    for (size_t i = 0; i < count; i++)
        into[i] = reduction == MAX   ? std::max(into[i], other[i])
                  : reduction == MIN ? std::min(into[i], other[i])
                                     : into[i] + other[i];
}
// Numbers that kernels should have computed are nonsense anyway: half precision is not summed, and AVG is a sum.
static void reduce(void* into, const void* other, size_t bytes, int type, int reduction) {
    if (type == FLOAT32) reduce((float*)into, (const float*)other, bytes / 4, reduction);
    if (type == FLOAT64) reduce((double*)into, (const double*)other, bytes / 8, reduction);
    if (type == INT32) reduce((int32_t*)into, (const int32_t*)other, bytes / 4, reduction);
    if (type == INT64) reduce((int64_t*)into, (const int64_t*)other, bytes / 8, reduction);
}

// Exchanges `bytes` of every rank, a slot at a time; `take(offset, size)` then reads the slots.
template <typename Take>
static int exchange(Communicator* c, const char* name, const void* send, size_t bytes, cudaStream_t s, Take take) {
    for (size_t offset = 0; offset < bytes; offset += SLOT) {
        size_t size = std::min(SLOT, bytes - offset);
        memcpy(c->shared->slots[c->rank], (const char*)send + offset, size);
        c->wait_for_all();
        take(offset, size);
        c->wait_for_all();
    }
    if (device_of(send) != current_device) {
        fprintf(stderr, "[null GPU] %s of memory that is not on device %d\n", name, current_device);
        return 4;  // an invalid argument
    }
    return submit(s, {"collective", name, bytes}) ? 1 : 0;
}
API int ncclAllReduce(const void* send, void* receive, size_t count, int type, int reduction, Communicator* c,
                      cudaStream_t s) {
    return exchange(c, "ncclAllReduce", send, count * width(type), s, [&](size_t offset, size_t size) {
        char* result = (char*)receive + offset;
        memcpy(result, c->shared->slots[0], size);
        for (int rank = 1; rank < c->ranks; rank++) reduce(result, c->shared->slots[rank], size, type, reduction);
    });
}
API int ncclBroadcast(const void* send, void* receive, size_t count, int type, int root, Communicator* c,
                      cudaStream_t s) {
    return exchange(c, "ncclBroadcast", send, count * width(type), s, [&](size_t offset, size_t size) {
        memcpy((char*)receive + offset, c->shared->slots[root], size);
    });
}
API int ncclBcast(void* buffer, size_t count, int type, int root, Communicator* c, cudaStream_t s) {
    return ncclBroadcast(buffer, buffer, count, type, root, c, s);
}
API int ncclAllGather(const void* send, void* receive, size_t count, int type, Communicator* c, cudaStream_t s) {
    size_t each = count * width(type);
    return exchange(c, "ncclAllGather", send, each, s, [&](size_t offset, size_t size) {
        for (int rank = 0; rank < c->ranks; rank++)
            memcpy((char*)receive + rank * each + offset, c->shared->slots[rank], size);
    });
}
