// Which table of kernels runs: the best this processor has, REQUANT_ISA in the
// environment, or the one a test asks for.

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif

namespace requant {

extern const Kernels kernels_baseline;
#if defined(REQUANT_X86_VARIANTS)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

struct Tables {
  const Kernels* table[4] = {&kernels_baseline, nullptr, nullptr, nullptr};
  int count = 1;

  Tables() {
#if defined(REQUANT_X86_VARIANTS)
    __builtin_cpu_init();
    unsigned a, b, c = 0, d;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
    const bool avx2 = f16c && __builtin_cpu_supports("avx2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2) table[count++] = &kernels_avx2;
    if (avx512) table[count++] = &kernels_avx512;
#endif
  }
};

const Tables& tables() {
  static const Tables all;
  return all;
}

const Kernels* find(const char* name) {
  for (const Kernels* const* k = tables().table; *k != nullptr; k++)
    if (std::strcmp((*k)->name, name) == 0) return *k;
  return nullptr;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{[] {
    const char* requested_name = std::getenv("REQUANT_ISA");
    const Kernels* requested = requested_name != nullptr ? find(requested_name) : nullptr;
    return requested != nullptr ? requested : tables().table[tables().count - 1];
  }()};
  return chosen;
}

}  // namespace

const Kernels* const* available_kernels() { return tables().table; }

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool use_kernels(const char* name) {
  const Kernels* found = find(name);
  if (found != nullptr) current().store(found, std::memory_order_relaxed);
  return found != nullptr;
}

#if defined(__x86_64__)

FloatState::FloatState() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
FloatState::~FloatState() { _mm_setcsr(unsigned(saved_)); }

#elif defined(__aarch64__)

FloatState::FloatState() {
  __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
  __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t(0)));
}
FloatState::~FloatState() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

#else

FloatState::FloatState() : saved_(0) {}
FloatState::~FloatState() {}

#endif

}  // namespace requant
