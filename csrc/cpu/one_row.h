// one_row: y = x W^T for one row of x, as few_rows.h, but by chunks of 128 weights whose scales multiply the sums of
// their products. Vector operations bound it, and this has the fewest for each weight.
#pragma once

#include "few_rows.h"

namespace lowbit::cpu {

constexpr int kOneRowTile = 4;  // rows of W that share what is loaded of x
// Rows of W from what is read to what is fetched into the L2 cache. The L1 cache, into which the next rows are fetched,
// waits for too few lines at a time to keep memory busy.
constexpr int64_t kOneRowAhead = 16;

// The codes of the rows of W. Of the last one, behind which a decoder reads too, a copy is read.
template <class Decoder>
class PackedRows {
 public:
  PackedRows(const QuantizedWeight& weight, int64_t k)
      : row_bytes(k / 2),
        packed_(weight.packed),
        last_row_(weight.numel / k - 1),
        copy_(static_cast<size_t>(row_bytes + Decoder::kBytesPast)) {
    std::copy_n(packed_ + last_row_ * row_bytes, row_bytes, copy_.data());
  }
  const uint8_t* operator[](int64_t row) const { return row == last_row_ ? copy_.data() : packed_ + row * row_bytes; }

  const int64_t row_bytes;

 private:
  const uint8_t* packed_;
  const int64_t last_row_;
  std::vector<uint8_t> copy_;
};

// sums[kOneRowTile][kLanes] = x . W of as many rows of W; scales[r] are those of row r, kScales for each chunk.
template <class Isa, int kScales>
void one_row_tile(const typename Isa::WideDecoder& decode, const uint8_t* const (&codes)[kOneRowTile],
                  const float* const (&scales)[kOneRowTile], const float* x, int64_t chunks, int64_t row_bytes,
                  float* sums) {
  using Vec = typename Isa::Vec;
  using Decoder = typename Isa::WideDecoder;
  Vec total[kOneRowTile];
#pragma GCC unroll 4
  for (Vec& each : total) each = Isa::zero();
  for (int64_t c = 0; c < chunks; ++c, x += Decoder::kChunk) {
    Vec products[kOneRowTile];
#pragma GCC unroll 4
    for (int v = 0; v < 8; v += 2) {
      const Vec x_odd = Isa::load(x + v * Isa::kLanes), x_even = Isa::load(x + (v + 1) * Isa::kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kOneRowTile; ++r) {
        const uint8_t* packed = codes[r] + c * (Decoder::kChunk / 2);
        if (v == 0) {
          __builtin_prefetch(packed + kOneRowTile * row_bytes);
          __builtin_prefetch(packed + kOneRowAhead * row_bytes, 0, 2);
        }
        const auto dwords = Decoder::dwords(packed, v / 2);
        const Vec odd = decode.odd(dwords), even = decode.even(dwords);
        products[r] = v == 0 ? Isa::mul(odd, x_odd) : Isa::fma(odd, x_odd, products[r]);
        products[r] = Isa::fma(even, x_even, products[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kOneRowTile; ++r) {
      const float* s = scales[r] + c * kScales;
      if constexpr (kScales == 4) {
        total[r] = Isa::fma(products[r], Isa::quarters(s[0], s[1], s[2], s[3]), total[r]);
      } else {
        total[r] = Isa::fma(products[r], Isa::join(Isa::broadcast(s[0]), Isa::broadcast(s[1])), total[r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kOneRowTile; ++r) Isa::store(sums + r * Isa::kLanes, total[r]);
}

// kHalves: blocks are of 32.
template <class Isa, class T, bool kHalves>
void one_row_by(const LinearArgs& args, const ParallelFor& parallel_for) {
  using Decoder = typename Isa::WideDecoder;
  constexpr int kScales = kHalves ? 4 : 2;
  const int64_t k = args.k;
  const PackedRows<Decoder> packed(args.weight, k);
  const Scratch x = permute_to_lane_order<Decoder, 1>(static_cast<const T*>(args.x), k);
  const int64_t blocks = ceil_div(args.n, kRowsOfWPerBlock);
  parallel_for(blocks, ceil_div(16384, k * kRowsOfWPerBlock), [&](int64_t first_block, int64_t last_block) {
    const Decoder decode(*args.weight.format);
    const ChunkScales<Isa, typename Isa::template Fp32Chunk<kHalves>> scales(args.weight, k);
    const Scratch sums(kRowsOfWPerBlock * Isa::kLanes), lora_b(args.rank * kRowsOfWPerBlock);
    for (int64_t n0 = first_block * kRowsOfWPerBlock; n0 < last_block * kRowsOfWPerBlock; n0 += kRowsOfWPerBlock) {
      const int64_t rows = std::min(kRowsOfWPerBlock, args.n - n0);
      scales.start(args.first_row + n0, rows);
      for (int64_t row = 0; row < rows; row += kOneRowTile) {
        const uint8_t* codes[kOneRowTile];
        const float* tile_scales[kOneRowTile];
        for (int r = 0; r < kOneRowTile; ++r) {
          const int64_t i = std::min(row + r, rows - 1);  // a row that is not there repeats the last
          codes[r] = packed[args.first_row + n0 + i];
          tile_scales[r] = scales.at(i, 0);
        }
        one_row_tile<Isa, kScales>(decode, codes, tile_scales, x.data(), k / Decoder::kChunk, packed.row_bytes,
                                   sums.data() + row * Isa::kLanes);
      }
      arrange_lora_b(args, n0, rows, lora_b.data());
      store_few_rows<Isa, T>(args, Isa::sums_of_rows(sums.data(), Isa::kLanes), lora_b.data(), 0, n0, rows);
    }
  });
}

// Whether one_row serves: an instruction set has its decoder, and chunks of 128 are whole.
template <class Isa>
bool is_one_row(const LinearArgs& args) {
  if constexpr (requires { typename Isa::WideDecoder; })
    return is_few_rows(args) && args.m == 1 && args.k % Isa::WideDecoder::kChunk == 0;
  return false;
}

template <class Isa>
void one_row(const LinearArgs& args, const ParallelFor& parallel_for) {
  for_dtype(args.dtype, [&]<class T>(T) {
    if (args.weight.block_size < kFewRowsChunk) return one_row_by<Isa, T, true>(args, parallel_for);
    one_row_by<Isa, T, false>(args, parallel_for);
  });
}

}  // namespace lowbit::cpu
