// Random problems for every kernel of the native library, under AddressSanitizer and UndefinedBehaviorSanitizer.
//
//     cmake -S . -B build/fuzz -DFOURBIT_FUZZ=ON && cmake --build build/fuzz -j2
//     build/fuzz/fuzz_native ROUNDS SEED
//
// Sizes are small and odd, buffers end where the problem ends, values are ordinary, random bits (NaN, infinity,
// subnormal numbers), zero, or huge. Every instruction set of the machine runs each problem; codec, dropout and
// row-wise functions must give the same bytes with all of them where the numbers are finite, and arguments out
// of range must be refused with nothing written. What differs is printed and ends the program.
#include "../csrc/fourbit.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace {

std::mt19937_64 source;

int64_t below(int64_t n) { return static_cast<int64_t>(source() % static_cast<uint64_t>(n)); }
int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
bool chance(int64_t n) { return below(n) == 0; }

[[noreturn]] void fail(const std::string& what) {
    std::printf("%s\n", what.c_str());
    std::exit(1);
}

// Bytes on the heap that end exactly where their block ends, so that one byte too far is an error; the beginning
// is aligned for fp32 and no more.
struct Buffer {
    std::unique_ptr<char[]> block;
    size_t shift, size;

    explicit Buffer(int64_t bytes) : shift(static_cast<size_t>(below(8)) * 4), size(static_cast<size_t>(bytes)) {
        block.reset(new char[shift + size]);
        for (size_t i = 0; i < shift + size; ++i) block[i] = static_cast<char>(source());
    }
    Buffer(const Buffer& other) : block(new char[other.shift + other.size]), shift(other.shift), size(other.size) {
        std::memcpy(block.get(), other.block.get(), shift + size);
    }
    Buffer& operator=(const Buffer&) = delete;
    template <class T = void>
    T* at() { return reinterpret_cast<T*>(block.get() + shift); }
    bool equals(const Buffer& other) const {
        return size == other.size && std::memcmp(block.get() + shift, other.block.get() + other.shift, size) == 0;
    }
};

constexpr int64_t kWidth[] = {4, 2, 2};  // bytes of fp32, bf16, fp16

float as_float(const void* data, int dtype, int64_t i) {
    if (dtype == 0) return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    // fp16 only has to be told finite or not here.
    const uint32_t wide = dtype == 1 ? uint32_t{bits} << 16 : (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

bool finite(Buffer& data, int dtype, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        if (!std::isfinite(as_float(data.at(), dtype, i))) return false;
    return true;
}

// n values of a dtype.
Buffer values(int dtype, int64_t n) {
    Buffer data(n * kWidth[dtype]);
    const int64_t kind = below(5);
    if (kind == 0) return data;  // random bits
    std::normal_distribution<float> normal(0.0f, kind == 1 ? 1e4f : 1.0f);
    for (int64_t i = 0; i < n; ++i) {
        const float value = kind == 2 ? 0.0f : kind == 3 && i % 7 ? 0.5f : normal(source);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (dtype == 0) std::memcpy(data.at<char>() + 4 * i, &bits, 4);
        // As fp16 the upper half is a number too, if another one.
        else data.at<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16) & (dtype == 2 ? 0xbfff : 0xffff);
    }
    return data;
}

Buffer floats(int64_t n) { return values(0, n); }

Buffer ascending(int64_t n) {
    std::vector<float> found(static_cast<size_t>(n));
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    for (auto& value : found) value = uniform(source);
    std::sort(found.begin(), found.end());
    Buffer data(4 * n);
    std::memcpy(data.at(), found.data(), data.size);
    return data;
}

std::vector<std::string> isas;

// Runs a problem with every instruction set, on fresh copies of `results`; the same bytes everywhere if `exact`.
void everywhere(const char* name, bool exact, const std::vector<Buffer>& results,
                const std::function<int(std::vector<Buffer>&)>& run, bool refused = false) {
    std::vector<Buffer> first;
    for (const auto& isa : isas) {
        if (fb_set_isa(isa.c_str())) fail("fb_set_isa " + isa);
        std::vector<Buffer> copies(results.begin(), results.end());
        const int code = run(copies);
        if (code != (refused ? 1 : 0)) fail(std::string(name) + ", " + isa + ": returns " + std::to_string(code));
        const auto& wanted = refused ? results : first.empty() ? copies : first;
        for (size_t i = 0; (exact || refused) && i < copies.size(); ++i)
            if (!copies[i].equals(wanted[i])) fail(std::string(name) + ", " + isa + ": result " + std::to_string(i));
        if (first.empty()) first.swap(copies);
    }
}

int threads() { return static_cast<int>(between(1, 3)); }
int64_t block_size() { return int64_t{32} << below(8); }

// The scales of b blocks: fp32, or in 8 bits.
struct Scales {
    bool nested;
    Buffer absmax, nested_absmax, offset, map;

    explicit Scales(int64_t b)
        : nested(chance(2)), absmax(nested ? Buffer(b) : floats(b)), nested_absmax(floats((b + 255) / 256)),
          offset(floats(1)), map(ascending(256)) {}
    float* second() { return nested ? nested_absmax.at<float>() : nullptr; }
    bool are_finite(int64_t b) {
        return nested ? finite(nested_absmax, 0, (b + 255) / 256) && finite(offset, 0, 1) : finite(absmax, 0, b);
    }
};

void codec() {
    const int dtype = static_cast<int>(below(3));
    const int64_t size = block_size(), n = between(0, chance(8) ? 40000 : 900), blocks = (n + size - 1) / size;
    Buffer w = values(dtype, n), thresholds = ascending(15), order(16);
    for (int i = 0; i < 16; ++i) order.at<uint8_t>()[i] = static_cast<uint8_t>(i);
    std::shuffle(order.at<uint8_t>(), order.at<uint8_t>() + 16, source);
    int64_t position = 0;
    while (position < n && std::isfinite(as_float(w.at(), dtype, position))) ++position;
    if (fb_find_nonfinite(w.at(), dtype, n, threads()) != (position < n ? position : -1)) fail("fb_find_nonfinite");
    const int64_t wrong = chance(10) ? (chance(2) ? 33 : 16) : size;
    everywhere("fb_quantize_4bit", position == n, {Buffer((n + 1) / 2), Buffer(4 * blocks)}, [&](auto& out) {
        return fb_quantize_4bit(w.at(), dtype, n, wrong, thresholds.at<float>(), order.at<uint8_t>(),
                                out[0].template at<uint8_t>(), out[1].template at<float>(), threads());
    }, wrong != size);
    Scales scales(blocks);
    Buffer codes((n + 1) / 2), book = ascending(16);
    everywhere("fb_dequantize_4bit", scales.are_finite(blocks), {Buffer(n * kWidth[dtype])}, [&](auto& out) {
        return fb_dequantize_4bit(codes.at<uint8_t>(), scales.absmax.at(), scales.second(), scales.offset.at<float>(),
                                  scales.map.at<float>(), n, size, book.at<float>(), out[0].at(), dtype, threads());
    });
}

void nested() {
    const int64_t b = between(1, chance(8) ? 20000 : 700), blocks = (b + 255) / 256;
    Buffer absmax = floats(b), thresholds = ascending(255), codes(b), outer = floats(blocks), offset = floats(1);
    Buffer map = ascending(256);
    everywhere("fb_quantize_absmax", finite(absmax, 0, b), {Buffer(b), Buffer(4 * blocks), Buffer(4)}, [&](auto& out) {
        return fb_quantize_absmax(absmax.at<float>(), b, thresholds.at<float>(), out[0].template at<uint8_t>(),
                                  out[1].template at<float>(), out[2].template at<float>(), threads());
    });
    const bool exact = finite(outer, 0, blocks) && finite(offset, 0, 1);
    everywhere("fb_dequantize_absmax", exact, {Buffer(4 * b)}, [&](auto& out) {
        return fb_dequantize_absmax(codes.at<uint8_t>(), outer.at<float>(), offset.at<float>(), map.at<float>(), b,
                                    out[0].template at<float>(), threads());
    });
}

void linear() {
    const int dtype = static_cast<int>(below(3));
    const int64_t m = between(1, chance(6) ? 40 : 5), k = between(1, 600), n = between(1, 50), size = block_size();
    Buffer x = values(dtype, m * k), bias = values(dtype, n), codes((n * k + 1) / 2), book = ascending(16);
    Scales scales((n * k + size - 1) / size);
    const bool with_bias = chance(2);
    everywhere("fb_linear_4bit", false, {Buffer(m * n * kWidth[dtype])}, [&](auto& out) {
        return fb_linear_4bit(x.at(), dtype, m, k, n, codes.at<uint8_t>(), scales.absmax.at(), scales.second(),
                              scales.offset.at<float>(), scales.map.at<float>(), size, book.at<float>(),
                              with_bias ? bias.at() : nullptr, out[0].at(), threads());
    });
}

void product() {
    const int dtype = static_cast<int>(below(2));
    const bool large = chance(40);  // several panels of deep weights meet many rows, and a megabyte comes out
    const int64_t most_m = large ? 300 : chance(6) ? 60 : 14, most = large ? 2700 : 1100;
    const int64_t m = between(1, most_m), k = between(1, large || chance(9) ? most : 150), size = block_size();
    const int64_t n = between(1, large || chance(9) ? most : 50), r = chance(3) ? 0 : between(1, chance(6) ? 70 : 20);
    Buffer x = values(dtype, m * k), bias = values(dtype, n), grad = values(dtype, m * n);
    Buffer codes((n * k + 1) / 2), book = ascending(16), a = floats(r * k), b = floats(n * r);
    Buffer low = values(dtype, m * r);
    Scales scales((n * k + size - 1) / size);
    std::vector<int64_t> keys(static_cast<size_t>(m));
    for (auto& value : keys) value = static_cast<int64_t>(source());
    FbProduct problem{};
    problem.x = x.at(), problem.rows = m, problem.in_features = k, problem.out_features = n, problem.dtype = dtype;
    problem.codes = codes.at<uint8_t>(), problem.absmax = scales.absmax.at(), problem.nested_absmax = scales.second();
    problem.offset = scales.offset.at<float>(), problem.map = scales.map.at<float>(), problem.block_size = size;
    problem.codebook = book.at<float>(), problem.bias = chance(2) ? bias.at() : nullptr;
    problem.few = m <= 16 && chance(2), problem.rank = r, problem.a = a.at<float>(), problem.b = b.at<float>();
    problem.scaling = 1.5f, problem.row = keys.data(), problem.position = keys.data(), problem.layer = 7;
    problem.seed = 3, problem.p = chance(2) ? 0.3 : 0.0, problem.grad = grad.at();
    everywhere("fb_product", false, {Buffer(m * n * kWidth[dtype]), Buffer(m * r * kWidth[dtype])}, [&](auto& out) {
        if (!fb_has_product(dtype)) return 0;
        problem.y = out[0].at(), problem.low = out[1].at();
        return fb_product(&problem, threads());
    });
    const bool needs_x = chance(2), needs_adapter = r > 0 && chance(2);
    problem.low = low.at();
    everywhere("fb_product_grad", false, {Buffer(m * k * kWidth[dtype]), Buffer(4 * r * k), Buffer(4 * n * r)},
               [&](auto& out) {
        if (!fb_has_product(dtype)) return 0;
        problem.grad_x = needs_x ? out[0].at() : nullptr;
        problem.grad_a = needs_adapter ? out[1].template at<float>() : nullptr;
        problem.grad_b = needs_adapter ? out[2].template at<float>() : nullptr;
        return fb_product_grad(&problem, threads());
    });
}

void dropout() {
    const int dtype = static_cast<int>(below(3));
    const int64_t t = between(0, 9), k = between(1, 300);
    Buffer x = values(dtype, t * k);
    std::vector<int64_t> row(static_cast<size_t>(t)), position(static_cast<size_t>(t));
    for (auto& value : row) value = static_cast<int64_t>(source());
    for (auto& value : position) value = below(1 << 20);
    const auto layer = static_cast<int64_t>(source()), seed = static_cast<int64_t>(source());
    const double p = static_cast<double>(below(1000)) / 1001;
    everywhere("fb_dropout", finite(x, dtype, t * k), {Buffer(t * k * kWidth[dtype])}, [&](auto& out) {
        return fb_dropout(x.at(), dtype, t, k, row.data(), position.data(), layer, seed, 3, p, out[0].at(), threads());
    });
}

void rows() {
    const int dtype = static_cast<int>(below(3)), kind = static_cast<int>(below(2));
    const int64_t t = between(0, 9), k = between(1, 300), n = t * k, bytes = n * kWidth[dtype];
    Buffer x = values(dtype, n), y = values(dtype, n), grad = values(dtype, n), weight = floats(k), scale = floats(t);
    const bool more = chance(2);
    everywhere("fb_rms_norm", false, {Buffer(bytes), Buffer(4 * t), Buffer(bytes)}, [&](auto& out) {
        return fb_rms_norm(x.at(), more ? y.at() : nullptr, dtype, t, k, weight.at<float>(), 1e-5f, out[2].at(),
                           out[0].at(), out[1].template at<float>(), threads());
    });
    const int64_t grads = between(1, 3);
    everywhere("fb_rms_norm_grad", false, {Buffer(bytes)}, [&](auto& out) {
        return fb_rms_norm_grad(grad.at(), grads > 1 ? y.at() : nullptr, grads > 2 ? x.at() : nullptr,
                                more ? y.at() : nullptr, x.at(), dtype, t, k, weight.at<float>(), scale.at<float>(),
                                out[0].at(), threads());
    });
    everywhere("fb_gated", false, {Buffer(bytes)}, [&](auto& out) {
        return fb_gated(x.at(), y.at(), dtype, n, kind, out[0].at(), threads());
    });
    everywhere("fb_gated_grad", false, {Buffer(bytes), Buffer(bytes)}, [&](auto& out) {
        return fb_gated_grad(grad.at(), x.at(), y.at(), dtype, n, kind, out[0].at(), out[1].at(), threads());
    });
    std::vector<int64_t> labels(static_cast<size_t>(t));
    for (auto& label : labels) label = below(k);
    const float softcap = chance(2) ? 0.0f : 7.0f;
    const auto losses = [&](auto& out) {
        return fb_cross_entropy(out[0].at(), dtype, t, k, labels.data(), 0.5f, softcap, kind,
                                out[1].template at<float>(), threads());
    };
    everywhere("fb_cross_entropy", finite(x, dtype, n), {x, Buffer(4 * t)}, losses);
    if (t > 0) {
        labels.back() = chance(2) ? k : -1;
        everywhere("fb_cross_entropy", true, {x, Buffer(4 * t)}, losses, true);
    }
    const int64_t batch = between(1, 3), heads = between(1, 4), width = 2 * between(1, 40), row = heads * width;
    const int64_t total = batch * row * t, apart = chance(2) ? t * width : 0;
    Buffer q = values(dtype, total), cos = values(dtype, batch * t * width), sin = values(dtype, batch * t * width);
    for (const int back : {0, 1})
        everywhere("fb_rotary", false, {Buffer(total * kWidth[dtype])}, [&](auto& out) {
            return fb_rotary(q.at(), dtype, batch, t, heads, width, row * t, row, width, cos.at(), sin.at(),
                             apart, back, out[0].at(), threads());
        });
}

void decode() {
    const int dtype = static_cast<int>(below(3));
    FbDecode d{};
    d.dtype = dtype, d.rows = between(1, chance(6) ? 20 : 5), d.layers = between(1, 2);
    d.hidden_size = between(1, 100), d.feed_forward = between(1, 100), d.kv_heads = between(1, 2);
    d.heads = d.kv_heads * between(1, 3), d.width = 2 * between(1, 20), d.slots = between(1, 30);
    d.room = d.slots + below(4), d.few_rows = 16, d.eps = 1e-5f, d.scale = 0.2f;
    d.activation = static_cast<int>(below(2));
    const int64_t size = block_size(), r = chance(2) ? 0 : between(1, 20), cache = d.rows * d.kv_heads * d.room * d.width;
    std::vector<Buffer> held;
    std::vector<Scales> scales;
    held.reserve(200), scales.reserve(20);
    const auto keep = [&](Buffer buffer) -> Buffer& { return held.emplace_back(buffer); };
    const auto linear = [&](FbDecodeLinear& into, int64_t n, int64_t k) {
        Scales& own = scales.emplace_back((n * k + size - 1) / size);
        FbProduct& p = into.product;
        p.in_features = k, p.out_features = n, p.codes = keep(Buffer((n * k + 1) / 2)).at<uint8_t>();
        p.absmax = own.absmax.at(), p.nested_absmax = own.second(), p.offset = own.offset.at<float>();
        p.map = own.map.at<float>(), p.block_size = size, p.codebook = keep(ascending(16)).at<float>();
        p.bias = chance(2) ? keep(values(dtype, n)).at() : nullptr, p.rank = r, p.scaling = 1.5f;
        p.a = keep(floats(r * k)).at<float>(), p.b = keep(floats(n * r)).at<float>();
        into.up = keep(floats(r * n)).at<float>();
    };
    std::vector<FbDecodeLayer> layers(static_cast<size_t>(d.layers));
    for (FbDecodeLayer& layer : layers) {
        linear(layer.q, d.heads * d.width, d.hidden_size), linear(layer.o, d.hidden_size, d.heads * d.width);
        linear(layer.k, d.kv_heads * d.width, d.hidden_size), linear(layer.v, d.kv_heads * d.width, d.hidden_size);
        linear(layer.gate, d.feed_forward, d.hidden_size), linear(layer.up, d.feed_forward, d.hidden_size);
        linear(layer.down, d.hidden_size, d.feed_forward);
        layer.input_norm = keep(floats(d.hidden_size)).at<float>();
        layer.output_norm = keep(floats(d.hidden_size)).at<float>();
        layer.q_norm = chance(2) ? keep(floats(d.width)).at<float>() : nullptr;
        layer.k_norm = layer.q_norm ? keep(floats(d.width)).at<float>() : nullptr;
        layer.keys = keep(values(dtype, cache)).at(), layer.values = keep(values(dtype, cache)).at();
        layer.window = chance(2) ? 0 : between(1, 10);
    }
    std::vector<int64_t> positions(static_cast<size_t>(d.rows * d.slots));
    for (auto& position : positions) position = between(-1, 12);
    d.layer = layers.data(), d.positions = positions.data();
    d.cos = keep(floats(d.rows * d.width)).at<float>(), d.sin = keep(floats(d.rows * d.width)).at<float>();
    everywhere("fb_decode", false, {values(dtype, d.rows * d.hidden_size)}, [&](auto& out) {
        if (d.rows > d.few_rows && !fb_has_product(dtype)) return 0;
        d.hidden = out[0].at();
        return fb_decode(&d, threads());
    });
}

void attention() {
    const int dtype = static_cast<int>(below(2));
    FbAttention problem{};
    problem.batch = between(1, 2), problem.kv_heads = between(1, 2);
    problem.heads = problem.kv_heads * between(1, 3);
    problem.length = between(1, chance(5) ? 330 : 40), problem.width = chance(4) ? between(1, 256) : between(1, 40);
    problem.scale = 0.125f, problem.dtype = dtype;
    Buffer lse(4 * problem.batch * problem.heads * problem.length), first(4 * problem.batch * problem.length);
    for (int64_t i = 0; i < problem.batch * problem.length; ++i)
        first.at<int32_t>()[i] = static_cast<int32_t>(below(i % problem.length + 1));
    problem.first = first.at<int32_t>(), problem.lse = lse.at<float>();
    std::vector<Buffer> held;
    held.reserve(8);
    const auto tensor = [&](FbAttentionTensor& into, int64_t heads) {
        const int64_t gap = below(3), row = problem.width + gap;
        const int64_t size = problem.batch * heads * problem.length * row - gap;
        held.push_back(values(dtype, size));
        into = {held.back().at(), heads * problem.length * row, problem.length * row, row};
        if (chance(2)) into.head = row, into.row = heads * row;  // [batch, length, heads, width]
    };
    for (auto* part : {&problem.q, &problem.o, &problem.grad, &problem.dq}) tensor(*part, problem.heads);
    for (auto* part : {&problem.k, &problem.v, &problem.dk, &problem.dv}) tensor(*part, problem.kv_heads);
    everywhere("fb_attention", false, {}, [&](auto&) { return fb_attention(&problem, threads()); });
    everywhere("fb_attention_grad", false, {}, [&](auto&) { return fb_attention_grad(&problem, threads()); });
}

}  // namespace

int main(int count, char** words) {
    const int64_t rounds = count > 1 ? std::atoll(words[1]) : 1000;
    source.seed(count > 2 ? static_cast<uint64_t>(std::atoll(words[2])) : 1);
    std::istringstream names(fb_isas());
    for (std::string name; names >> name;) isas.push_back(name);
    void (*const problems[])() = {codec,   codec,   nested, linear,    product,
                                   dropout, rows,    decode, attention};
    for (int64_t i = 0; i < rounds; ++i) problems[i % std::size(problems)]();
    std::printf("%lld problems with each of %s: clean\n", static_cast<long long>(rounds), fb_isas());
    return 0;
}
