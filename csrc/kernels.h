// What one instruction set provides: the inner kernels of codec_*.cpp, linear_*.cpp, dropout_*.cpp
// and elementwise_*.cpp. The files codec.cpp, linear.cpp, dropout.cpp and elementwise.cpp split the work, handle the ends that do not fill a
// block, and call through `kernels()`.
#pragma once

#include <cstdint>

// The 15 thresholds as a search tree and as a list. Node k of the tree has children 2k and 2k + 1;
// four steps k = 2k + (y > tree[k]) from k = 1 end at 16 + sorted position.
struct Search {
    float tree[16];      // tree[0] is unused
    float sorted[16];    // ascending; sorted[15] is +inf
    uint32_t order[16];  // sorted position -> code
};

// A few rows of x against some rows of packed weights. `prepare` puts a row of x into the order in which
// `linear` meets it: fp32, each run of 32 values as its 16 even elements followed by its 16 odd ones, so
// that the two nibbles of a byte meet their elements in whole vectors; or an order of its own.
struct LinearRows {
    const float* x;        // [M, x_stride], prepared, or what `turn` makes of them
    int64_t x_stride;      // K rounded up to a multiple of 128
    int dtype;             // of x before it was prepared
    int64_t M, K;          // K is a multiple of block_size
    const uint8_t* codes;  // [rows, K / 2]
    const float* absmax;   // [rows, K / block_size]
    int64_t rows, block_size;
    const float* codebook;  // [16]
    float* y;               // [M, rows]
    bool turned;            // whether x has been through `turn`; M is at most 32 then
};

// One row of dropout: x, y [K]; `counter` and `key` as the ABI defines them, column block 0.
struct DropoutRow {
    const void* x;
    void* y;
    int dtype;
    int64_t K;
    uint32_t row, position, layer;
    uint32_t key[2];
    uint32_t threshold;  // dropped when u16 < threshold; 0..65535
    float scale;
};

// One row of RMS norm: y = x s w [K] and s = 1 / sqrt(mean(x^2) + eps); of sum = x + more in place of x where more
// is not null.
struct NormRow {
    const void* x;
    const void* more;
    void* sum;
    const float* weight;  // [K]
    void* y;
    float* scale;  // [1]
    int dtype;
    int64_t K;
    float eps;
};

// Its gradient in x, of the sum of one to three gradients of y, and then plus `passed` unless that is null.
struct NormGradRow {
    const void* grads[3];  // the last ones may be null
    const void* passed;
    const void* x;
    const float* weight;
    void* grad_x;
    const float* scale;
    int dtype;
    int64_t K;
};

enum Activation : int { SILU = 0, GELU_TANH = 1 };

// A run of out = activation(gate) * up. The gradients may be written over gate and up.
struct GatedRun {
    const void* gate;
    const void* up;
    const void* grad;
    void* out;
    void* grad_gate;
    void* grad_up;
    int dtype, kind;
    int64_t n;
};

// One row of logits and the word that came: -log softmax(cap(scale logits))[label], cap(z) = softcap tanh(z / softcap)
// unless softcap is 0. The gradient takes the logits' place.
struct LossRow {
    void* logits;  // [words]
    int dtype;
    int64_t words, label;
    float scale, softcap;
    bool gradient;
    float* loss;
};

// y [n] = y + low [rank] times up [rank, n].
struct LowRow {
    const float *low, *up;
    int64_t rank, n;
    int dtype;
    void* y;
};

// Heads of one token, turned by the angles of cos and sin [width] (arXiv:2104.09864): x has a head every `stride`
// values, y is [heads, width] and may be x.
struct RotaryRow {
    const void* x;
    void* y;
    int dtype;
    int64_t heads, width, stride;
    const float *cos, *sin;
};

// Queries [group, width] of one token against the cached keys and values [slots, width] of their head.
struct CachedHead {
    const void *q, *keys, *values;
    const int64_t* positions;  // [slots], the last one the token's own; negative: nothing is there
    int64_t slots, window, group, width;
    float scale;
    int dtype;
    float* room;  // [2 width + slots]
    void* out;    // [group, width]
};

// y [M, n] = x [M, K] times rows of a weight [n, K] of the dtype.
struct DenseRows {
    const float* x;
    int64_t M, K;
    const void* weight;
    int64_t n;
    int dtype;
    float* y;
};

// Attention, see attention.h. Keys of a tile, and the widest head.
constexpr int64_t ATTENTION_TILE = 64, ATTENTION_MAX_WIDTH = 256;

struct AttentionTensor {
    void* data;  // of one head, [T, width]
    int64_t row_bytes;
};

struct AttentionHead {
    AttentionTensor q, k, v, o, grad, dq, dk, dv;
    const int32_t* first;  // [T]
    float* lse;            // [T]
    int dtype;
    int64_t length, width;
    float scale;
};

// Packs and sums of a head have whole tiles of keys of `width` rounded up to a multiple of `width_step`.
struct AttentionKernels {
    int64_t operand_bytes;
    int64_t width_step;
    int64_t forward_queries, backward_queries;  // that are taken together
    int64_t (*forward_room)(int64_t width);  // bytes of scratch of a thread
    int64_t (*backward_room)(int64_t width);
    // Of one key-value head, for `forward`.
    void (*pack)(const AttentionHead& h, void* keys, void* values, char* room);
    // The `forward_queries` from `row` on.
    void (*forward)(const AttentionHead& h, int64_t row, const void* keys, const void* values, char* room);
    // The same for `backward`, three packs of a head.
    void (*pack_backward)(const AttentionHead& kv, void* packs, char* room);
    // Queries first, a multiple of `backward_queries`, to last of a group of heads: dQ, and sums [2, tiles of last,
    // wide, tile] for dK and dV.
    void (*backward)(const AttentionHead* heads, int64_t group, int64_t first, int64_t last, const void* packs,
                     float* sums, char* room);
    // dK and dV from the sums of queries before `cut`, if any, and of the others.
    void (*finish)(const AttentionHead& kv, int64_t cut, const float* early, const float* late, char* room);
};

// Panels that a tile meets in turn, at most.
constexpr int64_t MOST_TOGETHER = 8;

// The many-row product, see product.cpp: tiles of `rows` rows of x by panels of `lanes` columns of the result.
struct ProductKernels {
    int64_t rows, lanes;
    int64_t tiles_bytes;  // so many of x meet a panel: as many as a core's caches feed fast enough
    int64_t together;     // of the panels, that a tile meets in turn where too few rows fit; at most MOST_TOGETHER
    int64_t step;         // the words of a tile and of a panel are a multiple of it, zeros beyond the last
    // How many rows a tile of so many has, zeros included; at most `rows`.
    int64_t (*height)(int64_t rows);
    // out [count][width] of the words of n lines, `stride` bytes apart, and zeros; n <= width <= 32.
    void (*transpose)(const char* lines, int64_t stride, int64_t n, int64_t count, uint32_t* out, int64_t width);
    // A tile of `height` rows of `words` words, of n lines of so many bytes, one after the other, and zeros.
    void (*pack)(const char* lines, int64_t bytes, int64_t n, int64_t words, int64_t height, uint32_t* tile);
    // panel [words][lanes] of `lanes` columns of `rows` rows of packed weights, `stride` bytes and `blocks` scales
    // apart, of which each lies in one block.
    void (*columns)(const uint8_t* codes, int64_t stride, const float* absmax, int64_t blocks, int64_t rows,
                    const float* codebook, uint32_t* panel);
    // words [lanes] of two rows, `width` values of each, the second null for none; bits say which values count.
    void (*interleave)(const void* first, const void* second, uint32_t bits, uint32_t second_bits, int64_t width,
                       uint32_t* words);
    void (*kept)(const DropoutRow& row, uint32_t* bits);
    // sums [lanes] += more * scale where bits are set.
    void (*add_kept)(const float* more, uint32_t bits, float scale, float* sums);
    // sums [rows][lanes] = or += tiles times panel [count][lanes]: of the `words` words of the tiles those from
    // `start` on. Sums of rows that fill a tile up are written too.
    void (*multiply)(const uint32_t* tiles, int64_t rows, int64_t words, int64_t start, int64_t count,
                     const uint32_t* panel, bool add, float* sums);
    // out [width] of the dtype = sums + bias, both [lanes].
    void (*store)(const float* sums, const float* bias, int64_t width, void* out);
    // The same for rows of sums, to rows of out so many bytes apart, past the caches; null: there is none.
    void (*stream)(const float* sums, const float* bias, int64_t rows, int64_t width, void* out, int64_t bytes);
};

// The kernels of one instruction set, in a namespace of its name.
//
// quantize       whole blocks only; block_size is a multiple of 32
// dequantize     the same; `stream` allows stores that bypass the cache (`out` at 64 bytes)
// has_nonfinite  whether any of n values is NaN or infinite
// restore        scales of one block of double quantization: map[codes8] * scale + offset
// prepare        one row of x, [K], for `linear`; K is a multiple of 32
// dot            the sum of a[i] * b[i]
// kept           of a row of dropout, which elements stay: bits [ceil(K / 32)]; x and y are not read. Only where
//                there is a many-row product
#define FB_KERNELS(isa)                                                                               \
    namespace isa {                                                                                   \
    void quantize(const void* w, int dtype, int64_t blocks, int64_t block_size, const Search& search, \
                  uint8_t* codes, float* absmax);                                                     \
    void dequantize(const uint8_t* codes, const float* absmax, int64_t blocks, int64_t block_size,    \
                    const float* codebook, void* out, int dtype, bool stream);                        \
    bool has_nonfinite(const void* w, int dtype, int64_t n);                                          \
    void restore(const uint8_t* codes8, int64_t count, const float* map, float scale, float offset,   \
                 float* absmax);                                                                      \
    void prepare(const void* x, int dtype, int64_t K, float* prepared);                               \
    void linear(const LinearRows& rows);                                                              \
    float dot(const float* a, const float* b, int64_t n);                                             \
    void dropout(const DropoutRow& row);                                                              \
    void kept(const DropoutRow& row, uint32_t* bits);                                                 \
    void rms_norm(const NormRow& row);                                                                \
    void rms_norm_grad(const NormGradRow& row);                                                           \
    void gated(const GatedRun& run);                                                                  \
    void gated_grad(const GatedRun& run);                                                             \
    void cross_entropy(const LossRow& row);                                                           \
    void widen(const void* x, int dtype, int64_t n, float* out);                                      \
    void add(void* y, const void* x, int dtype, int64_t n);                                           \
    void add_low(const LowRow& row);                                                                  \
    void rotate(const RotaryRow& row);                                                                \
    void attend(const CachedHead& head);                                                              \
    void dense(const DenseRows& rows);                                                                \
    extern const AttentionKernels attention;                                                          \
    extern const ProductKernels product;                                                              \
    }

FB_KERNELS(scalar)
FB_KERNELS(avx2)
FB_KERNELS(avx512)
FB_KERNELS(avx512bf16)
FB_KERNELS(amx)
FB_KERNELS(neon)

namespace amx {
// words [x_stride / 2][16] of at most 16 prepared rows [M, x_stride] of bf16, and zeros.
void turn(const float* rows, int64_t x_stride, int64_t M, float* words);
}

struct Kernels {
    const char* name;
    decltype(scalar::quantize)* quantize;
    decltype(scalar::dequantize)* dequantize;
    decltype(scalar::has_nonfinite)* has_nonfinite;
    decltype(scalar::restore)* restore;
    decltype(scalar::prepare)* prepare;
    decltype(scalar::linear)* linear;
    decltype(scalar::dot)* dot;
    decltype(scalar::dropout)* dropout;
    decltype(scalar::rms_norm)* rms_norm;
    decltype(scalar::rms_norm_grad)* rms_norm_grad;
    decltype(scalar::gated)* gated;
    decltype(scalar::gated_grad)* gated_grad;
    decltype(scalar::cross_entropy)* cross_entropy;
    decltype(scalar::widen)* widen;  // this and the next four: between the products of a decoded token, decode.h
    decltype(scalar::add)* add;
    decltype(scalar::add_low)* add_low;
    decltype(scalar::rotate)* rotate;
    decltype(scalar::attend)* attend;
    decltype(scalar::dense)* dense;  // the head's product, which is not packed
    const AttentionKernels* attention;       // of bf16
    const AttentionKernels* attention_wide;  // of the others
    const ProductKernels* product;           // of bf16, and of fp32; null where there is none
    const ProductKernels* product_wide;
    decltype(amx::turn)* turn = nullptr;  // where `linear` of bf16 takes x so
};

// The instruction set in use.
const Kernels& kernels();
