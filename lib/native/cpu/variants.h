// Instruction-set variants, chosen at run time.
//
// A kernel is one always-inlined template; each variant is a thin wrapper that carries a target attribute. Attributes
// instead of compiler flags keep AVX code out of inline functions that the rest of the process shares, and one build
// then runs on every machine. Never call such a template from a lambda: a lambda does not inherit the target.
#pragma once

#include <cstdlib>
#include <cstring>

#define UPSNET_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define UPSNET_X86 1
#define UPSNET_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define UPSNET_TARGET_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define UPSNET_TARGET_AVX2 __attribute__((target("avx2,fma")))
#else
#define UPSNET_X86 0
#endif

// Between these two a product and a sum stay two roundings in every variant, where some machines have one instruction
// for both. The wrappers with the target attributes must stand between them as well.
#ifdef __clang__
#define UPSNET_NO_CONTRACTION _Pragma("STDC FP_CONTRACT OFF")
#define UPSNET_CONTRACTION_AGAIN _Pragma("STDC FP_CONTRACT ON")
#else
#define UPSNET_NO_CONTRACTION _Pragma("GCC push_options") _Pragma("GCC optimize(\"fp-contract=off\")")
#define UPSNET_CONTRACTION_AGAIN _Pragma("GCC pop_options")
#endif

namespace upsnet {

enum class Variant { generic, avx2, avx512 };

// The best variant of this machine; UPSNET_NATIVE_CPU (generic, avx2, avx512) can only lower it, which the tests use.
inline Variant chosen_variant() {
#if UPSNET_X86
  const char* wish = std::getenv("UPSNET_NATIVE_CPU");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (wish != nullptr && std::strcmp(wish, "generic") == 0) return Variant::generic;
  if (avx512 && (wish == nullptr || std::strcmp(wish, "avx2") != 0)) return Variant::avx512;
  if (avx2) return Variant::avx2;
#endif
  return Variant::generic;
}

// Whether this machine multiplies pairs of bfloat16 by AVX-512, if that is the variant chosen.
inline bool multiplies_halves() {
#if UPSNET_X86
  return chosen_variant() == Variant::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace upsnet
