// The C ABI of fourbit's native library: plain C++17 on raw pointers, no Python and no torch.
//
// Common to all functions
//   dtype    0 fp32, 1 bf16, 2 fp16
//   threads  the most OpenMP threads a call may use; small calls use one
//   return   0, or 1 when an argument is out of range (nothing is written then)
//
// A 4-bit tensor of n values lies flat in blocks of `block_size` values, a power of two from 32. Two codes
// share a byte, the first in the high nibble; each block has one fp32 scale, absmax; the last block
// may be short. Where `nested_absmax` is given, `absmax` points to 8-bit codes instead and block i
// has the scale map[absmax[i]] * nested_absmax[i / 256] + offset[0] (double quantization).
//
// Every result is the same for every instruction set and thread count: bit for bit in the codec and
// in the row-wise functions, up to the order of fp32 summation in the products.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define FB_API extern "C" __declspec(dllexport)
#else
#define FB_API extern "C" __attribute__((visibility("default")))
#endif

// Raised whenever a signature below or its meaning changes; the loader refuses another number.
#define FB_ABI_VERSION 7

FB_API int64_t fb_abi(void);

// Instruction sets: the one in use, those this machine has (best last, one space apart), and the
// choice of another for tests. fb_set_isa returns 1 for a name that fb_isas does not list.
FB_API const char* fb_isa(void);
FB_API const char* fb_isas(void);
FB_API int fb_set_isa(const char* name);

// Position of the first NaN or infinity among n values, or -1.
FB_API int64_t fb_find_nonfinite(const void* w, int dtype, int64_t n, int threads);

// codes[ceil(n/2)], absmax[ceil(n/block_size)] of w[n]. `thresholds` are the 15 ascending midpoints
// of the sorted codebook, `order` maps a sorted position to its code. A block that holds a NaN or an
// infinity gets a non-finite absmax and unspecified codes.
FB_API int fb_quantize_4bit(const void* w, int dtype, int64_t n, int64_t block_size, const float* thresholds,
                            const uint8_t* order, uint8_t* codes, float* absmax, int threads);

// out[n] = codebook[code] * absmax in fp32, rounded once (to nearest, ties to even) to `dtype`.
FB_API int fb_dequantize_4bit(const uint8_t* codes, const void* absmax, const float* nested_absmax,
                              const float* offset, const float* map, int64_t n, int64_t block_size,
                              const float* codebook, void* out, int dtype, int threads);

// Double quantization of b scales: codes8[b], nested_absmax[ceil(b/256)], offset[1] (their mean, summed
// in fp64 in a fixed order). `thresholds` are the 255 ascending midpoints of the 8-bit map.
FB_API int fb_quantize_absmax(const float* absmax, int64_t b, const float* thresholds, uint8_t* codes8,
                              float* nested_absmax, float* offset, int threads);
FB_API int fb_dequantize_absmax(const uint8_t* codes8, const float* nested_absmax, const float* offset,
                                const float* map, int64_t b, float* absmax, int threads);

// y[M,N] = x[M,K] @ dequantized[N,K]^T + bias[N], accumulated in fp32 and rounded once to `dtype`; x, y and
// bias (or null) share it. The weights are fp32; the instruction sets avx512bf16 and amx round them to bf16
// where x is bf16, as restoring to bf16 does. Made for few rows. A row of y does not depend on M.
FB_API int fb_linear_4bit(const void* x, int dtype, int64_t M, int64_t K, int64_t N, const uint8_t* codes,
                          const void* absmax, const float* nested_absmax, const float* offset,
                          const float* map, int64_t block_size, const float* codebook, const void* bias,
                          void* y, int threads);

// A product of many rows with a packed weight W [N,K], and with an adapter of rank r on it (arXiv:2106.09685):
//
//   y[M,N] = x W^T + bias + scaling low B^T        low[M,r] = dropout(x) A^T, as fb_dropout does it
//
// W, A and B are taken in `dtype`, sums are fp32 and rounded once; a row of y does not depend on the others.
typedef struct {
    const void* x;  // [M,K]
    int64_t rows, in_features, out_features;  // M, K, N
    int dtype;
    const uint8_t* codes;
    const void* absmax;
    const float* nested_absmax;
    const float* offset;
    const float* map;
    int64_t block_size;
    const float* codebook;
    const void* bias;  // or null
    void* y;
    int few;       // whether y is first what fb_linear_4bit gives, rounded, and then what the adapter adds
    int64_t rank;  // r; 0 for no adapter, and nothing of what follows up to grad
    const float *a, *b;  // [r,K], [N,r]
    float scaling;
    void* low;  // written by fb_product and read by fb_product_grad
    const int64_t *row, *position;
    int64_t layer, seed, step;
    double p;  // 0 for no dropout
    const void* grad;  // of y
    void* grad_x;      // or null
    float *grad_a, *grad_b;  // both or neither
} FbProduct;

// Refused (1) for a dtype that fb_has_product denies. Both return 2 where there is no memory for their scratch:
// the scales in fp32, some MB for each thread, and 64 bytes for each value of a line of A and B.
FB_API int fb_has_product(int dtype);
FB_API int fb_product(const FbProduct* problem, int threads);
FB_API int fb_product_grad(const FbProduct* problem, int threads);

// y[T,K] = x[T,K] with elements dropped at the rate q = floor(p * 65536 + 0.5) / 65536, below 1, and
// the kept ones times fp32(1 / (1 - q)), rounded to `dtype`. Which ones depends on (seed, step, layer,
// row[t], position[t], k) alone: Philox4x32-10 with key (seed lo32 xor hi32, step) and counter
// (row, position, k / 8, layer), each taken modulo 2^32; element k uses the (k % 8)-th 16 bits. y may
// be x.
FB_API int fb_dropout(const void* x, int dtype, int64_t T, int64_t K, const int64_t* row,
                      const int64_t* position, int64_t layer, int64_t seed, int64_t step, double p, void* y,
                      int threads);

// RMS norm (arXiv:1910.07467): y[T,K] = x s weight with s[t] = 1 / sqrt(mean(x[t]^2) + eps), the fp32 `scale`
// that backward needs; weight is fp32 [K]. Unless `more` is null, of sum = x + more, rounded, in place of x. The gradient
// is that in x, of the sum of the gradients of y (second and third may be null), plus `passed` unless that is null; it
// is rounded once, and grad_x may be any of them.
FB_API int fb_rms_norm(const void* x, const void* more, int dtype, int64_t T, int64_t K, const float* weight, float eps,
                       void* sum, void* y, float* scale, int threads);
FB_API int fb_rms_norm_grad(const void* grad, const void* second, const void* third, const void* passed, const void* x,
                            int dtype, int64_t T, int64_t K, const float* weight, const float* scale, void* grad_x,
                            int threads);

// out[n] = activation(gate[n]) * up[n] (arXiv:2002.05202) and its gradients; kind 0 SiLU, 1 GELU by tanh.
FB_API int fb_gated(const void* gate, const void* up, int dtype, int64_t n, int kind, void* out, int threads);
FB_API int fb_gated_grad(const void* grad, const void* gate, const void* up, int dtype, int64_t n, int kind,
                         void* grad_gate, void* grad_up, int threads);

// y[batch, length, heads, width] = x with the two halves of each head turned by an angle for each pair of values
// (arXiv:2104.09864, halves as in Llama): y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2; back: the transposed map, for
// gradients. x has these strides, its last one 1; cos and sin [batch or 1, length, width] are of x's dtype and lie
// `angles_batch` values apart for each of the batch. width is even and at most 1024. y must not be x.
FB_API int fb_rotary(const void* x, int dtype, int64_t batch, int64_t length, int64_t heads, int64_t width,
                     int64_t x_batch, int64_t x_row, int64_t x_head, const void* cos, const void* sin,
                     int64_t angles_batch, int back, void* y, int threads);

// loss[R] of logits[R,V] and labels[R], each a word: -log softmax(cap(scale logits))[label], fp32, with cap(z) =
// softcap tanh(z / softcap), or z where softcap is 0. With `gradient` the gradients of the losses with respect to the
// logits take the logits' place.
FB_API int fb_cross_entropy(void* logits, int dtype, int64_t R, int64_t V, const int64_t* labels, float scale,
                            float softcap, int gradient, float* loss, int threads);

// One step of AdamW (arXiv:1711.05101), in place: weight, grad, mean and square [n]. The eight coefficients are
// 1 - rate decay, b1, 1 - b1, b2, 1 - b2, 1 / sqrt(1 - b2^t), eps, rate / (1 - b1^t). With 8-bit states each
// block of 256 has its fp32 absmax [ceil(n / 256)]; maps [2, 256] and thresholds [2, 255] are of mean and square.
FB_API int fb_adamw(float* weight, const float* grad, float* mean, float* square, int64_t n,
                    const float* coefficients, int threads);
FB_API int fb_adamw_8bit(float* weight, const float* grad, uint8_t* mean, float* mean_absmax, uint8_t* square,
                         float* square_absmax, int64_t n, const float* coefficients, const float* maps,
                         const float* thresholds, int threads);

// Causal attention of grouped heads (arXiv:2205.14135). A tensor is one of [batch, heads, length, width], given
// by the strides, in elements, of all but its last dimension, which must be contiguous. Query t of a row of the
// batch sees keys first[t] to t, first being int32 [batch, length] with 0 <= first[t] <= t.
typedef struct {
    void* data;
    int64_t batch, head, row;
} FbAttentionTensor;

typedef struct {
    FbAttentionTensor q, k, v, o;         // o is written by fb_attention and read by fb_attention_grad
    FbAttentionTensor grad, dq, dk, dv;   // of o, and what fb_attention_grad writes
    const int32_t* first;
    float* lse;  // [batch, heads, length]: log of the sum of the exponentials, written, then read
    int64_t batch, heads, kv_heads, length, width;  // heads is a multiple of kv_heads; width at most 256
    float scale;
    int dtype;
} FbAttention;

// Both return 2 where there is no memory for their scratch, some 8 bytes for each value of k, times threads.
FB_API int fb_attention(const FbAttention* problem, int threads);
FB_API int fb_attention_grad(const FbAttention* problem, int threads);

// One token for each of a few rows through decoder layers of Llama's structure (arXiv:2302.13971), in place in
// `hidden`: x += o(attention(rotary(q(norm x)), rotary(k(norm x)), v(norm x))), x += down(act(gate(norm x)) * up(norm x)).
// Its keys and values are written into the last used slot of a cache [rows, kv_heads, room, width].
typedef struct {
    FbProduct product;  // without x, rows, dtype, y and low
    const float* up;    // scaling B^T, [rank, out_features]
} FbDecodeLinear;

typedef struct {
    FbDecodeLinear q, k, v, o, gate, up, down;
    const float *input_norm, *output_norm;  // [hidden_size], of RMS norms
    const float *q_norm, *k_norm;           // [width], of each head, or null
    void *keys, *values;
    int64_t window;  // positions that a token sees, its own included; 0: all
} FbDecodeLayer;

typedef struct {
    const FbDecodeLayer* layer;
    int64_t layers, rows, hidden_size, feed_forward, heads, kv_heads, width, slots, room;
    int64_t few_rows;  // up to so many, packed codes are multiplied as they are; more need fb_has_product
    void* hidden;      // [rows, hidden_size]
    const int64_t* positions;  // [rows, slots] of what the slots hold, the last one's own; negative: nothing
    const float *cos, *sin;    // [rows, width]
    float eps, scale;          // of the norms, of the scores
    int activation, dtype;
} FbDecode;

FB_API int fb_decode(const FbDecode* problem, int threads);

// y[M,N] = x[M,K] times weight[N,K]^T, all of one dtype, accumulated in fp32; M from 1 to 4: more rows are
// better multiplied in tiles. A row of y does not depend on M.
FB_API int fb_dense(const void* x, const void* weight, int dtype, int64_t M, int64_t K, int64_t N, void* y,
                    int threads);
