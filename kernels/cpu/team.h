// Teams of threads that flush subnormal numbers to zero: on many CPUs each one met in arithmetic costs 150 cycles.

#pragma once

#include <atomic>
#include <climits>
#include <cstdint>
#include <thread>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastsde {

// Flushes subnormal operands and results in this thread until it goes out of scope, then restores the thread's mode.
class FlushSubnormals {
  public:
    FlushSubnormals() : before_(mode()) { set_mode(before_ | FLUSHES); }
    ~FlushSubnormals() { set_mode(before_); }
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

  private:
    // The compiler does not know that arithmetic depends on the mode. With the barrier, loads and stores stay on their
    // side of the switch, and with them the arithmetic in between.
    static void barrier() { asm volatile("" ::: "memory"); }

#if defined(__x86_64__)
    static constexpr uint64_t FLUSHES = 0x8040;  // flush to zero, and denormals are zero
    static uint64_t mode() { return _mm_getcsr(); }
    static void set_mode(uint64_t mode) {
        barrier();
        _mm_setcsr((unsigned)mode);
        barrier();
    }
#elif defined(__aarch64__)
    static constexpr uint64_t FLUSHES = 1 << 24;  // FZ
    static uint64_t mode() {
        uint64_t mode;
        asm volatile("mrs %0, fpcr" : "=r"(mode));
        return mode;
    }
    static void set_mode(uint64_t mode) {
        barrier();
        asm volatile("msr fpcr, %0" : : "r"(mode));
        barrier();
    }
#else
    static constexpr uint64_t FLUSHES = 0;
    static uint64_t mode() { return 0; }
    static void set_mode(uint64_t) { barrier(); }
#endif

    const uint64_t before_;
};

// Where the threads of a team wait for each other: awake for some microseconds, in which the others nearly always
// arrive, and then asleep. OpenMP's own barriers keep a processor busy for milliseconds: next to other processes,
// possibly the one that the awaited thread needs.
class Barrier {
  public:
    void wait() {
#if defined(_OPENMP)
        const uint32_t turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1);
            if (sleepers_.load() > 0) wake();
            return;
        }
        for (int tries = 0; turn_.load(std::memory_order_acquire) == turn; tries++)
            tries < PAUSES ? pause() : tries < PAUSES + YIELDS ? std::this_thread::yield() : sleep(turn);
#endif
    }

  private:
    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    // Sleeps until woken, or not at all if the turn is over: the last to arrive ends it before looking for sleepers.
    void sleep(uint32_t turn) {
#if defined(__linux__)
        sleepers_.fetch_add(1);
        syscall(SYS_futex, &turn_, FUTEX_WAIT_PRIVATE, turn, nullptr, nullptr, 0);
        sleepers_.fetch_sub(1);
#else
        (void)turn;
        std::this_thread::yield();
#endif
    }

    void wake() {
#if defined(__linux__)
        syscall(SYS_futex, &turn_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
    }

    static constexpr int PAUSES = 200, YIELDS = 50;
    std::atomic<int> arrived_{0}, sleepers_{0};
    std::atomic<uint32_t> turn_{0};
};

// Runs body() in each of ``threads`` threads, over which its ``omp for nowait`` loops are split. This is the only place
// where kernels make threads. The body must not throw.
template <class Body>
static inline void run_team(int threads, Body body) {
    Barrier end;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const FlushSubnormals flushes;
        body();
        end.wait();  // so that all threads reach OpenMP's own barrier, which follows, at the same time
    }
}

}  // namespace fastsde
