// CPU kernels, compiled at first use by library.py.
//
// Each exported function takes a pointer to a struct of arguments. library.py declares the fields
// of these structs, too, and has the compiler check that both agree (see build.py).
//
// Shapes are those of reference/.

#include "vectors.h"
#include "threads.h"
#include "tiles.h"
#include "panels.h"
#include "attention.h"
#include "linear.h"
#include "norm_act.h"
#include "sample.h"

// A kernel call that was recorded (recording.py). `answers`: the kernel returns 0 if it refuses.
struct Recorded {
  const void* kernel;
  const char* arguments;
  int64_t answers;
};

// Runs the calls in order. Returns 0, or the number of the one that refuses, counted from 1.
extern "C" int64_t nanovllm_replay(const Recorded* calls, int64_t num) {
  for (int64_t i = 0; i < num; ++i) {
    const Recorded& at = calls[i];
    if (!at.answers) ((void (*)(const char*))at.kernel)(at.arguments);
    else if (!((int64_t (*)(const char*))at.kernel)(at.arguments)) return i + 1;
  }
  return 0;
}
