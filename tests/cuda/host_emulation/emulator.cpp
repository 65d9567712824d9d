// Runs kernels on the host, a block at a time, each of its threads as a fiber: a thread runs until it waits for its warp
// (a shuffle, a ballot) or for its block (a barrier). Which warp goes on is drawn at random, so that a warp may be a
// barrier ahead of the others, as on the device, and a result that depends on the order differs from seed to seed.
//
// Fails, with a message, where the device would hang or do what nobody defined: a warp whose lanes wait for different
// things, a barrier that not all threads of the block reach, shared memory that was not asked for. Shared memory is NaN
// when a block starts. It cannot show what only the device has: races within a warp, memory order, speed.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace faststeer {
constexpr size_t SHARED_BYTES = 128 * 1024;
float4 shared_memory[SHARED_BYTES / sizeof(float4)];
}  // namespace faststeer

namespace {

constexpr unsigned WARP = 32, FULL_MASK = 0xffffffffu;
constexpr size_t STACK_BYTES = 64 * 1024, UNASKED_SHARED_BYTES = 48 * 1024;
constexpr uint32_t POISON = 0x7fc0dead;  // a NaN

enum class Wait { NOTHING, SHUFFLE_XOR, SHUFFLE, BALLOT, BARRIER, PART_OF_WARP, DONE };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  dim3 index;
  Wait wait;
  int argument;    // of a shuffle
  uint32_t value;  // given, then received
};

ucontext_t scheduler;
std::vector<Fiber> fibers;
Fiber* running = nullptr;
emulator::Thread thread_function;
void* thread_context;
std::mt19937 random_numbers;
std::map<const void*, size_t> allowed_shared_bytes;
std::string error;

[[noreturn]] void fail(const char* what) {
  throw std::runtime_error("block " + std::to_string(blockIdx.x) + " of " + std::to_string(blockDim.x) + " x " +
                           std::to_string(blockDim.y) + " threads: " + what);
}

void start() {
  thread_function(thread_context);
  running->wait = Wait::DONE;
  swapcontext(&running->context, &scheduler);
}

uint32_t wait_for(Wait wait, unsigned mask, int argument, uint32_t value) {
  Fiber& self = *running;
  if (mask != FULL_MASK) wait = Wait::PART_OF_WARP;
  self.wait = wait, self.argument = argument, self.value = value;
  swapcontext(&self.context, &scheduler);
  return self.value;
}

void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
  swapcontext(&scheduler, &fiber.context);
}

// What all lanes of a warp wait for, once none of them can go on.
Wait run_warp(Fiber* lanes) {
  for (unsigned i = 0; i < WARP; ++i) {
    if (lanes[i].wait == Wait::NOTHING) resume(lanes[i]);
  }
  for (unsigned i = 1; i < WARP; ++i) {
    if (lanes[i].wait != lanes[0].wait) fail("the lanes of a warp wait for different things");
  }
  if (lanes[0].wait == Wait::PART_OF_WARP) fail("a warp operation without all lanes");
  return lanes[0].wait;
}

void exchange(Fiber* lanes, Wait wait) {
  uint32_t given[WARP], ballot = 0;
  for (unsigned i = 0; i < WARP; ++i) {
    given[i] = lanes[i].value;
    ballot |= static_cast<uint32_t>(given[i] != 0) << i;
    if (wait == Wait::SHUFFLE_XOR && lanes[i].argument != lanes[0].argument)
      fail("lanes shuffle over different distances");
  }
  for (unsigned i = 0; i < WARP; ++i) {
    if (wait == Wait::BALLOT)
      lanes[i].value = ballot;
    else if (wait == Wait::SHUFFLE)
      lanes[i].value = given[lanes[i].argument % WARP];
    else
      lanes[i].value = given[i ^ lanes[i].argument];
    lanes[i].wait = Wait::NOTHING;
  }
}

void run_block(size_t shared_bytes) {
  uint32_t* const words = reinterpret_cast<uint32_t*>(faststeer::shared_memory);
  std::fill(words, words + faststeer::SHARED_BYTES / sizeof(uint32_t), POISON);
  const unsigned threads = blockDim.x * blockDim.y, warps = threads / WARP;
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(STACK_BYTES);
    fiber.index = dim3(i % blockDim.x, i / blockDim.x);
    fiber.wait = Wait::NOTHING;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  std::vector<unsigned> ready(warps), at_barrier;
  for (unsigned w = 0; w < warps; ++w) ready[w] = w;
  while (!ready.empty()) {
    const size_t drawn = random_numbers() % ready.size();
    Fiber* const lanes = &fibers[ready[drawn] * WARP];
    const Wait wait = run_warp(lanes);
    if (wait == Wait::SHUFFLE_XOR || wait == Wait::SHUFFLE || wait == Wait::BALLOT) {
      exchange(lanes, wait);
      continue;
    }
    if (wait == Wait::BARRIER) at_barrier.push_back(ready[drawn]);
    ready.erase(ready.begin() + drawn);
    if (!ready.empty() || at_barrier.empty()) continue;
    if (at_barrier.size() != warps) fail("some warps wait at a barrier, others are done");
    for (Fiber& fiber : fibers) fiber.wait = Wait::NOTHING;
    ready.swap(at_barrier);
  }
  for (size_t i = shared_bytes / sizeof(uint32_t); i < faststeer::SHARED_BYTES / sizeof(uint32_t); ++i) {
    if (words[i] != POISON) fail("shared memory was written beyond what was asked for");
  }
}

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace

void __syncthreads() { wait_for(Wait::BARRIER, FULL_MASK, 0, 0); }
float __shfl_xor_sync(unsigned mask, float value, int distance) {
  return bits_as<float>(wait_for(Wait::SHUFFLE_XOR, mask, distance, bits_as<uint32_t>(value)));
}
float __shfl_sync(unsigned mask, float value, int lane) {
  return bits_as<float>(wait_for(Wait::SHUFFLE, mask, lane, bits_as<uint32_t>(value)));
}
unsigned __ballot_sync(unsigned mask, bool vote) { return wait_for(Wait::BALLOT, mask, 0, vote); }

namespace emulator {

void allow_shared_memory(const void* kernel, size_t bytes) { allowed_shared_bytes[kernel] = bytes; }

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, Thread thread, void* context) {
  const auto allowed = allowed_shared_bytes.find(kernel);
  const size_t limit = allowed == allowed_shared_bytes.end() ? UNASKED_SHARED_BYTES : allowed->second;
  const unsigned threads = config.blockDim.x * config.blockDim.y * config.blockDim.z;
  if (config.dynamicSmemBytes > limit || threads == 0 || threads > 1024 || threads % WARP != 0 ||
      config.gridDim.x == 0) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = config.gridDim, blockDim = config.blockDim;
  thread_function = thread, thread_context = context;
  try {
    for (unsigned block = 0; block < gridDim.x; ++block) {
      blockIdx = dim3(block);
      run_block(config.dynamicSmemBytes);
    }
  } catch (const std::exception& caught) {
    error = caught.what();
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

}  // namespace emulator

extern "C" void emulator_seed(uint32_t seed) { random_numbers.seed(seed); }
extern "C" const char* emulator_error() { return error.c_str(); }
