// Kernels of dense_onchip.cuh by dtype and direction, and their launch.
#include "onchip_rows.cuh"

#define KD_ONCHIP(NAME, T, DIRECTION)                                                                      \
  extern "C" __global__ void __launch_bounds__(kd::kMostWarps* kd::kWarp, 1)                               \
      NAME(const void* student, int64_t student_stride, const void* teacher, int64_t teacher_stride,       \
           void* dlogits, int64_t dlogits_stride, float* loss, const float* weights, int rows, int vocab,  \
           int dlogits_vocab, int stages, float per_t, float c) {                                          \
    kd::onchip_rows<T, kd::DIRECTION>({student, teacher, dlogits, loss, weights, student_stride,           \
                                       teacher_stride, dlogits_stride, rows, vocab, dlogits_vocab, stages, \
                                       per_t, c});                                                         \
  }

KD_ONCHIP(kd_forward_onchip_fp32, float, kForward)
KD_ONCHIP(kd_forward_onchip_bf16, __nv_bfloat16, kForward)
KD_ONCHIP(kd_forward_onchip_fp16, __half, kForward)
KD_ONCHIP(kd_reverse_onchip_fp32, float, kReverse)
KD_ONCHIP(kd_reverse_onchip_bf16, __nv_bfloat16, kReverse)
KD_ONCHIP(kd_reverse_onchip_fp16, __half, kReverse)
