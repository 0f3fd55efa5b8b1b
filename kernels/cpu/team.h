// Teams of threads, which flush subnormal numbers to zero: on many CPUs each that arithmetic meets costs 150 cycles.

#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastsde {

// Flushes in this thread, for operands and results, until it goes out of scope; then the thread's mode is as before.
class FlushSubnormals {
  public:
    FlushSubnormals() : before_(mode()) { set_mode(before_ | FLUSHES); }
    ~FlushSubnormals() { set_mode(before_); }
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

  private:
    // The compiler does not know that arithmetic depends on the mode. What is read from memory or written to it stays on
    // its side of the switch, and with it the arithmetic between.
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

// body() in each of so many threads, to which its ``omp for`` loops give their iterations. The only place where kernels
// make threads. The body may not throw.
template <class Body>
static inline void run_team(int threads, Body body) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const FlushSubnormals flushes;
        body();
    }
}

}  // namespace fastsde
