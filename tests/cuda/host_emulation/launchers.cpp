// The launchers as C functions for ctypes. Tables are passed in the order of the struct.
#include "../../../csrc/cuda/kernels.h"

using namespace faststeer;

extern "C" {

// config: threads per row, rows per block, elements per vector, vectors per thread; returns the cudaError_t.
int emulate_row(int op, const int32_t* config, const RowArguments* arguments) {
  const LaunchConfig chosen{config[0], config[1], config[2], config[3]};
  return launch_row(static_cast<RowOp>(op), chosen, *arguments, nullptr);
}

void emulate_choose_launch(int64_t rows, int64_t hidden, int32_t itemsize, int aligned, int32_t sm_count, int32_t asked,
                           int32_t* config) {
  const LaunchConfig chosen = choose_launch(rows, hidden, itemsize, aligned != 0, sm_count, asked);
  config[0] = chosen.threads_per_row, config[1] = chosen.rows_per_block;
  config[2] = chosen.elements_per_vector, config[3] = chosen.vectors_per_thread;
}

int32_t emulate_columns_of(const char* text) { return columns_of(text); }

int64_t emulate_size() { return sizeof(RowArguments); }
}
