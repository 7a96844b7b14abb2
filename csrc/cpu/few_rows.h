// few_rows: y = x W^T for few rows of x, by chunks of 64 weights of 4 bits, which are looked up and never
// stored; the sums stay in registers. The chunks are an instruction set's: Fp32Chunk, Bf16Chunk and ScaledBf16Chunk
// for products of pairs, and Int8Chunk for the approximate product. Each has
//
//   kVectors, kFloats   vectors of weights in a chunk; what arrange writes of a row of x, in floats
//   kScales             1, or 2 where the halves of a chunk are blocks of 32
//   weights             the codes of a chunk and its scale: vector(v) looks up the weights of one vector
//   table               instead of the scale, where kRowsPerTable rows look up in one table
//   arrange, x          64 elements of a row of x as they are kept; what fma takes of it for vector v
//   fma                 sums + products
//
//   x    is arranged once per call
//   W    goes by blocks of kRowsOfWPerBlock rows, whose sums of 16 lanes are kept in the L1 cache beside a piece of x
//   tile holds kRowsOfW x M sums in registers while it goes through the piece
//
// Each lane is summed in the order of k, whatever the tiling: results depend neither on the number of threads nor on
// the rows of W that are computed beside.
#pragma once

#include "dequantize.h"
#include "gemv.h"
#include "support.h"

namespace lowbit::cpu {

constexpr int64_t kFewRowsChunkBytes = kFewRowsChunk / 2;

constexpr int kRowsOfX = 8;  // at a time: more of them are as many passes over a block of W
// Rows of W that share what is loaded of x. Their sums, tables and codes fit 32 registers.
template <int M>
constexpr int kRowsOfW = M <= 4 ? 4 : 2;
constexpr int64_t kRowsOfWPerBlock = 16;
constexpr int64_t kPieceBytes = 24 << 10;  // of x: half of the L1 cache

// x [m, k] in passes of at most kRowsOfX rows, each [chunk][row][vector].
template <class Isa, class Chunk, class T>
class ArrangedRows {
 public:
  ArrangedRows(const T* x, int64_t m, int64_t k)
      : rows(m), passes(ceil_div(m, kRowsOfX)), chunks(k / kFewRowsChunk), storage_(m * chunks * Chunk::kFloats) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      float* to = storage_.data() + first_row(pass) * chunks * Chunk::kFloats;
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t row = first_row(pass); row < first_row(pass + 1); ++row, to += Chunk::kFloats)
          Chunk::arrange(x + row * k + chunk * kFewRowsChunk, to);
    }
  }
  int64_t first_row(int64_t pass) const { return pass * rows / passes; }
  int64_t rows_of(int64_t pass) const { return first_row(pass + 1) - first_row(pass); }
  const float* at(int64_t pass, int64_t chunk) const {
    return storage_.data() + (first_row(pass) * chunks + rows_of(pass) * chunk) * Chunk::kFloats;
  }
  // The number of pieces of x that go through a block of W one after the other.
  int64_t pieces() const {
    const int64_t chunk_bytes = ceil_div(rows, passes) * Chunk::kFloats * static_cast<int64_t>(sizeof(float));
    return ceil_div(chunks, std::max<int64_t>(kPieceBytes / chunk_bytes, 1));
  }

  const int64_t rows, passes, chunks;

 private:
  Scratch storage_;
};

// The scales of a block of rows of W: Chunk::kScales for each chunk.
template <class Isa, class Chunk>
class ChunkScales {
 public:
  ChunkScales(const QuantizedWeight& weight, int64_t k)
      : weight_(weight),
        k_(k),
        per_row_(k / kFewRowsChunk * Chunk::kScales),
        decoded_(per_row_ + 2),
        scales_(kRowsOfWPerBlock * per_row_ + 2) {}  // SharedTables reads those of one chunk more

  // Rows [first_row, first_row + rows) are next.
  void start(int64_t first_row, int64_t rows) const {
    constexpr int64_t kElements = kFewRowsChunk / Chunk::kScales;
    const int shift = block_shift(weight_);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t begin = (first_row + row) * k_, first = begin >> shift, last = (begin + k_ - 1) >> shift;
      float* to = scales_.data() + row * per_row_;
      if (weight_.block_size == kElements) {
        decode_scales<Isa>(weight_, first, per_row_, to);
        continue;
      }
      decode_scales<Isa>(weight_, first, last - first + 1, decoded_.data());
      for (int64_t i = 0; i < per_row_; ++i) to[i] = decoded_.data()[((begin + i * kElements) >> shift) - first];
    }
  }
  const float* at(int64_t row, int64_t chunk) const { return scales_.data() + row * per_row_ + chunk * Chunk::kScales; }

 private:
  const QuantizedWeight& weight_;
  const int64_t k_, per_row_;
  const Scratch decoded_, scales_;
};

// The tables that R rows of W look up in, where rows share them. Those of a chunk are made while the one before it is
// multiplied: on Zen 4 they would delay its products by a fifth.
template <class Chunk, int R>
struct SharedTables {
  static constexpr int kRows = Chunk::kRowsPerTable;
  // Chunk c is next; behind the last one are numbers of any value.
  void prepare(const Chunk& chunk, const float* const (&scales)[R], int64_t c) {
#pragma GCC unroll 4
    for (int i = 0; i < R / kRows; ++i) tables[i] = chunk.table(scales + i * kRows, c);
  }
  typename Chunk::Weights weights(const Chunk& chunk, int row, const uint8_t* packed) const {
    return chunk.weights(packed, tables[row / kRows], row % kRows);
  }
  decltype(std::declval<Chunk>().table(nullptr, 0)) tables[R / kRows];
};

// sums[R][M][kLanes] += x . W over `chunks` chunks of R rows of W; fetches the codes `ahead` bytes on: the hardware's
// prefetcher stops at each page.
template <class Isa, class Chunk, int R, int M>
void few_rows_tile(const Chunk& chunk, const uint8_t* const (&codes)[R], const float* const (&scales)[R],
                   const float* x, int64_t chunks, int64_t ahead, float* sums) {
  using Vec = typename Isa::Vec;
  Vec total[R][M];
#pragma GCC unroll 16
  for (int i = 0; i < R * M; ++i) total[i / M][i % M] = Isa::load(sums + i * Isa::kLanes);
  constexpr bool kSharesTables = requires { Chunk::kRowsPerTable; };
  std::conditional_t<kSharesTables, SharedTables<Chunk, R>, std::false_type> tables;
  if constexpr (kSharesTables) tables.prepare(chunk, scales, 0);
  for (int64_t c = 0; c < chunks; ++c, x += M * Chunk::kFloats) {
    typename Chunk::Weights weights[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* packed = codes[r] + c * kFewRowsChunkBytes;
      __builtin_prefetch(packed + ahead, 0, Isa::kFetchLocality);
      if constexpr (kSharesTables) {
        weights[r] = tables.weights(chunk, r, packed);
      } else {
        weights[r] = chunk.weights(packed, scales[r] + c * Chunk::kScales);
      }
    }
    if constexpr (kSharesTables) tables.prepare(chunk, scales, c + 1);
#pragma GCC unroll 4
    for (int v = 0; v < Chunk::kVectors; ++v) {
      decltype(weights[0].vector(v)) w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) w[r] = weights[r].vector(v);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const auto xm = Chunk::x(x + m * Chunk::kFloats, v);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r][m] = weights[r].fma(w[r], xm, total[r][m]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * M; ++i) Isa::store(sums + i * Isa::kLanes, total[i / M][i % M]);
}

// sums[rows][M][kLanes] += x . W over chunks [begin, end) of a block of rows of W, whose codes begin at `packed`;
// `next` is where the codes begin that are read after these.
template <class Isa, class Chunk, int M>
void few_rows_piece(const Chunk& chunk, const ChunkScales<Isa, Chunk>& scales, const uint8_t* packed, int64_t row_bytes,
                    int64_t rows, int64_t begin, int64_t end, const float* x, const uint8_t* next, float* sums) {
  constexpr int R = kRowsOfW<M>;
  for (int64_t row = 0; row < rows; row += R) {
    const uint8_t* codes[R];
    const float* tile_scales[R];
    for (int r = 0; r < R; ++r) {
      const int64_t i = std::min(row + r, rows - 1);  // a row that is not there repeats the last; its sums are not used
      codes[r] = packed + i * row_bytes + begin * kFewRowsChunkBytes;
      tile_scales[r] = scales.at(i, begin);
    }
    const int64_t ahead = row + R < rows ? R * row_bytes : next - codes[0];
    few_rows_tile<Isa, Chunk, R, M>(chunk, codes, tile_scales, x, end - begin, ahead, sums + row * M * Isa::kLanes);
  }
}

// Adds LoRA and bias to the sums [kRowsOfWPerBlock] of row m of y in columns [n0, n0 + rows), and stores them; lora_b
// is [rank][kRowsOfWPerBlock].
template <class Isa, class T>
void store_few_rows(const LinearArgs& args, typename Isa::Vec sums, const float* lora_b, int64_t m, int64_t n0,
                    int64_t rows) {
  for (int64_t r = 0; r < args.rank; ++r)
    sums = Isa::fma(Isa::broadcast(args.t[m * args.rank + r]), Isa::load(lora_b + r * kRowsOfWPerBlock), sums);
  T* y = static_cast<T*>(args.y) + m * args.n + n0;
  if (rows == kRowsOfWPerBlock && !args.bias) return Isa::store(y, sums);
  float values[kRowsOfWPerBlock];
  Isa::store(values, sums);
  for (int64_t row = 0; row < rows; ++row)
    from_float(args.bias ? values[row] + bias_of(args.bias, n0 + row) : values[row], y + row);
}

template <class Isa, class T, class Chunk>
void few_rows_by(const LinearArgs& args, const ParallelFor& parallel_for) {
  static_assert(Isa::kLanes == kRowsOfWPerBlock);
  const int64_t k = args.k, row_bytes = k / 2;
  const ArrangedRows<Isa, Chunk, T> x(static_cast<const T*>(args.x), args.m, k);
  const int64_t blocks = ceil_div(args.n, kRowsOfWPerBlock), pieces = x.pieces();
  parallel_for(blocks, ceil_div(16384, k * kRowsOfWPerBlock), [&](int64_t first_block, int64_t last_block) {
    const Chunk chunk(*args.weight.format);
    const ChunkScales<Isa, Chunk> scales(args.weight, k);
    const int64_t sums_size = kRowsOfWPerBlock * args.m * Isa::kLanes;
    const Scratch sums(sums_size), lora_b(args.rank * kRowsOfWPerBlock);
    const auto sums_of = [&](int64_t pass) { return sums.data() + x.first_row(pass) * kRowsOfWPerBlock * Isa::kLanes; };
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t n0 = block * kRowsOfWPerBlock, rows = std::min(kRowsOfWPerBlock, args.n - n0);
      const uint8_t* packed = args.weight.packed + (args.first_row + n0) * row_bytes;
      scales.start(args.first_row + n0, rows);
      std::fill_n(sums.data(), sums_size, 0.0f);
      for (int64_t i = 0; i < pieces; ++i) {
        const int64_t begin = i * x.chunks / pieces, end = (i + 1) * x.chunks / pieces;
        const bool last = i + 1 == pieces;
        const uint8_t* next = packed + (last ? kRowsOfWPerBlock * row_bytes : end * kFewRowsChunkBytes);
        for (int64_t pass = 0; pass < x.passes; ++pass) {
          for_few_rows<kRowsOfX>(x.rows_of(pass), [&]<int M>(std::integral_constant<int, M>) {
            few_rows_piece<Isa, Chunk, M>(chunk, scales, packed, row_bytes, rows, begin, end, x.at(pass, begin), next,
                                          sums_of(pass));
          });
        }
      }
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t r = 0; r < args.rank; ++r)
          lora_b.data()[r * kRowsOfWPerBlock + row] = args.lora_b[(n0 + row) * args.rank + r];
      for (int64_t pass = 0; pass < x.passes; ++pass) {
        const int64_t stride = x.rows_of(pass) * Isa::kLanes;  // from one row of W to the next
        for (int64_t m = 0; m < x.rows_of(pass); ++m)
          store_few_rows<Isa, T>(args, Isa::sums_of_rows(sums_of(pass) + m * Isa::kLanes, stride), lora_b.data(),
                                 x.first_row(pass) + m, n0, rows);
      }
    }
  });
}

// Whether an instruction set has the chunks; the others multiply up to kGemvMaxRows rows by gemv.h.
template <class Isa>
constexpr bool kHasFewRows = requires { typename Isa::template Fp32Chunk<false>; };

// Calls few_rows_by with Chunk<whether a chunk has two scales>.
template <class Isa, class T, template <bool> class Chunk>
void few_rows_with(const LinearArgs& args, const ParallelFor& parallel_for) {
  if (args.weight.block_size < kFewRowsChunk) return few_rows_by<Isa, T, Chunk<true>>(args, parallel_for);
  few_rows_by<Isa, T, Chunk<false>>(args, parallel_for);
}

template <class Isa>
void few_rows(const LinearArgs& args, const ParallelFor& parallel_for) {
  for_dtype(args.dtype, [&]<class T>(T) {
    if constexpr (std::is_same_v<T, Bf16> && requires { typename Isa::template Bf16Chunk<false>; }) {
      if (args.m > std::max(Isa::kExactBf16Rows, Isa::kScaledSumsRows))
        return few_rows_with<Isa, T, Isa::template Bf16Chunk>(args, parallel_for);
      if (args.m > Isa::kExactBf16Rows) return few_rows_with<Isa, T, Isa::template ScaledBf16Chunk>(args, parallel_for);
    }
    few_rows_with<Isa, T, Isa::template Fp32Chunk>(args, parallel_for);
  });
}

}  // namespace lowbit::cpu
