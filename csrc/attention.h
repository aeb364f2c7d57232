// Causal attention in tiles of queries and keys (arXiv:2205.14135): source that each instruction set
// compiles with a `Math` of its own, which says how operands are held and multiplied. A `Math::Scope` lives while
// one thread multiplies.
//
//   forward   S = scale Q K^T,  P = softmax(S),  O = P V,  lse = log sum exp S
//   backward  P = exp(S - lse), dP = dO V^T, dS = scale P (dP - rowsum(dO O)),
//             dQ = dS K, dK = dS^T Q, dV = P^T dO
//
// Query t sees keys first[t] to t. All products are C[m, n] = A[m, k] B[k, n] with A in rows and B packed;
// sums are fp32. P and dS are rounded to the operand type, nothing else is.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"

namespace {

// What an instruction set exports; see kernels.h.
template <class Math>
struct AttentionExport {
    using Operand = typename Math::Operand;

    static void pack(const AttentionHead& h, void* keys, void* values, char* room) {
        AttentionForward<Math>::pack(h, static_cast<Operand*>(keys), static_cast<Operand*>(values), room);
    }

    static void forward(const AttentionHead& h, int64_t row, const void* keys, const void* values, char* room) {
        AttentionForward<Math>::queries(h, row, static_cast<const Operand*>(keys), static_cast<const Operand*>(values),
                                        room);
    }

    static void pack_backward(const AttentionHead& kv, void* packs, char* room) {
        AttentionBackward<Math>::pack(kv, static_cast<Operand*>(packs), room);
    }

    static void backward(const AttentionHead* heads, int64_t group, int64_t first, int64_t last, const void* packs,
                         float* sums, char* room) {
        AttentionBackward<Math>::queries(heads, group, first, last, static_cast<const Operand*>(packs), sums, room);
    }

    static constexpr AttentionKernels kernels = {sizeof(Operand),
                                                 Math::WIDTH_STEP,
                                                 Math::FORWARD_QUERIES,
                                                 Math::BACKWARD_QUERIES,
                                                 AttentionForward<Math>::room_bytes,
                                                 AttentionBackward<Math>::room_bytes,
                                                 pack,
                                                 forward,
                                                 pack_backward,
                                                 backward,
                                                 AttentionBackward<Math>::finish};
};

}  // namespace
