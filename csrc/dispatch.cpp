// Which instruction set is used: chosen once when the library is loaded, changed only by fb_set_isa.
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "fourbit.h"
#include "kernels.h"

#if defined(FB_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

const Kernels scalar_kernels = {"scalar",        scalar::quantize, scalar::dequantize, scalar::has_nonfinite,
                                scalar::restore, scalar::prepare,  scalar::linear,     scalar::dot,
                                scalar::dropout, scalar::rms_norm, scalar::rms_norm_grad, scalar::gated,
                                scalar::gated_grad, scalar::cross_entropy, scalar::widen, scalar::add, scalar::add_low, scalar::rotate,
                                scalar::attend, scalar::dense, &scalar::attention, &scalar::attention, nullptr, nullptr};
#if defined(FB_HAVE_AVX2)
const Kernels avx2_kernels = {"avx2",          avx2::quantize, avx2::dequantize, avx2::has_nonfinite,
                              scalar::restore, avx2::prepare,  avx2::linear,     avx2::dot,
                              avx2::dropout,   avx2::rms_norm, avx2::rms_norm_grad, avx2::gated,
                              avx2::gated_grad, avx2::cross_entropy, avx2::widen, avx2::add, avx2::add_low, avx2::rotate,
                                avx2::attend, avx2::dense, &avx2::attention, &avx2::attention, nullptr, &avx2::product};
#endif
#if defined(FB_HAVE_AVX512)
const Kernels avx512_kernels = {"avx512",        avx512::quantize, avx512::dequantize, avx512::has_nonfinite,
                                avx512::restore, avx512::prepare,  avx512::linear,     avx512::dot,
                                avx512::dropout, avx512::rms_norm, avx512::rms_norm_grad,
                                avx512::gated, avx512::gated_grad, avx512::cross_entropy, avx512::widen, avx512::add, avx512::add_low, avx512::rotate,
                                avx512::attend, avx512::dense, &avx512::attention,
                                &avx512::attention, nullptr, &avx512::product};
#endif
#if defined(FB_HAVE_AVX512BF16)
const Kernels avx512bf16_kernels = {"avx512bf16",          avx512::quantize, avx512::dequantize,
                                    avx512::has_nonfinite, avx512::restore,  avx512bf16::prepare,
                                    avx512bf16::linear,    avx512::dot,      avx512::dropout,
                                    avx512::rms_norm,      avx512::rms_norm_grad, avx512::gated,
                                    avx512::gated_grad, avx512::cross_entropy, avx512::widen, avx512::add, avx512::add_low, avx512::rotate,
                                avx512::attend, avx512::dense, &avx512bf16::attention, &avx512::attention,
                                    &avx512bf16::product, &avx512::product};
#endif
#if defined(FB_HAVE_AMX)
const Kernels amx_kernels = [] {
    Kernels table = avx512bf16_kernels;
    table.name = "amx";
    table.linear = amx::linear;
    table.turn = amx::turn;
    table.product = &amx::product;
    table.attention = &amx::attention;
    return table;
}();

// Linux lends a process the tiles when it asks for them (Documentation/arch/x86/xstate.rst). The processor is asked
// directly: older compilers' __builtin_cpu_supports does not know AMX.
bool has_amx() {
    constexpr unsigned BF16_BIT = 1u << 22, TILE_BIT = 1u << 24;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BF16_BIT) && (d & TILE_BIT) &&
           syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#endif
// What the compiler vectorizes well enough from the portable source has no NEON version.
#if defined(FB_HAVE_NEON)
const Kernels neon_kernels = {"neon",          neon::quantize,  neon::dequantize, scalar::has_nonfinite,
                              scalar::restore, scalar::prepare, neon::linear,     scalar::dot,
                              scalar::dropout, scalar::rms_norm, scalar::rms_norm_grad, scalar::gated,
                              scalar::gated_grad, scalar::cross_entropy, scalar::widen, scalar::add, scalar::add_low, scalar::rotate,
                                scalar::attend, scalar::dense, &scalar::attention, &scalar::attention, nullptr, nullptr};
#endif

// Worst first, so that the last one is the default.
std::vector<const Kernels*> available() {
    std::vector<const Kernels*> found{&scalar_kernels};
#if defined(FB_HAVE_AVX2)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        found.push_back(&avx2_kernels);
#endif
#if defined(FB_HAVE_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back(&avx512_kernels);
#endif
#if defined(FB_HAVE_AVX512BF16)
    if (found.back() == &avx512_kernels && __builtin_cpu_supports("avx512bf16"))
        found.push_back(&avx512bf16_kernels);
#endif
#if defined(FB_HAVE_AMX)
    if (found.back() == &avx512bf16_kernels && has_amx()) found.push_back(&amx_kernels);
#endif
#if defined(FB_HAVE_NEON)
    found.push_back(&neon_kernels);
#endif
    return found;
}

const std::vector<const Kernels*> all = available();
std::atomic<const Kernels*> chosen{all.back()};

}  // namespace

const Kernels& kernels() { return *chosen.load(std::memory_order_relaxed); }

int64_t fb_abi(void) { return FB_ABI_VERSION; }

const char* fb_isa(void) { return kernels().name; }

const char* fb_isas(void) {
    static const std::string names = [] {
        std::string joined;
        for (const Kernels* table : all) joined += (joined.empty() ? "" : " ") + std::string(table->name);
        return joined;
    }();
    return names.c_str();
}

int fb_set_isa(const char* name) {
    for (const Kernels* table : all) {
        if (std::strcmp(table->name, name) == 0) {
            chosen.store(table, std::memory_order_relaxed);
            return 0;
        }
    }
    return 1;
}
