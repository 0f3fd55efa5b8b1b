// Working memory for the threads of a kernel. Throws std::bad_alloc if there is not enough.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastsde {

// Asks for huge pages, before memory is first touched. Only for so much memory that malloc maps it on its own.
static inline void prefer_huge_pages(float* memory, int64_t count) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 1 << 21, MAPPED = 1 << 25;
    const uintptr_t first = ((uintptr_t)memory + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = (uintptr_t)(memory + count) / PAGE * PAGE;
    if (end > first + MAPPED) madvise((void*)first, end - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)count;
#endif
}

// Floats aligned to 64 bytes, initially zero.
class Buffer {
  public:
    explicit Buffer(int64_t count) {
        const size_t bytes = ((size_t)count * sizeof(float) / 64 + 1) * 64;
        data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
        if (!data_) throw std::bad_alloc();
        std::memset(data_, 0, bytes);
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator float*() { return data_; }

  private:
    float* data_;
};

// One object for each thread of a team, made before the threads start: an exception must not leave a thread.
template <class T>
class PerThread {
  public:
    template <class... Arguments>
    explicit PerThread(int threads, Arguments&&... arguments) {
        for (int i = 0; i < std::max(threads, 1); i++) all_.push_back(std::make_unique<T>(arguments...));
    }

    T& mine() {
#if defined(_OPENMP)
        return *all_[omp_get_thread_num()];
#else
        return *all_[0];
#endif
    }

  private:
    std::vector<std::unique_ptr<T>> all_;
};

}  // namespace fastsde
