// Constants of Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
// 3", SC 2011): multipliers chosen for avalanche, key increments from the golden ratio and sqrt(3) - 1.
#pragma once

#include <cstdint>

namespace {

constexpr int PHILOX_ROUNDS = 10;
constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;
constexpr uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;

}  // namespace
