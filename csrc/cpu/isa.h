// The instruction set levels that the row routines are compiled for, and the one to use here.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace faststeer {

struct Level {
  const char* name;
  bool runs_here;
};

#if defined(__x86_64__)
constexpr int N_LEVELS = 3;
#else
constexpr int N_LEVELS = 1;
#endif

// In ascending order.
inline const Level* levels() {
  static const Level all[N_LEVELS] = {
      {"baseline", true},
#if defined(__x86_64__)
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {"avx512", __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
#endif
  };
  return all;
}

// The highest level that runs here, or the one that FASTSTEER_CPU_ISA names, to test it or to compare.
inline int chosen_level() {
  const char* wanted = std::getenv("FASTSTEER_CPU_ISA");
  int best = -1;
  for (int i = 0; i < N_LEVELS; ++i) {
    if (levels()[i].runs_here && (wanted == nullptr || levels()[i].name == std::string(wanted))) best = i;
  }
  if (best < 0) {
    throw std::runtime_error("FASTSTEER_CPU_ISA must be baseline, avx2 or avx512, and one that this machine has; got " +
                             std::string(wanted));
  }
  return best;
}

}  // namespace faststeer
