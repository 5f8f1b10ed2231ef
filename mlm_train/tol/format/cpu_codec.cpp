// Group-wise integers to values. See cpu_codec.py for its caller, and codec.py for the format.

#include <cstdint>
#include <cstring>
#include <omp.h>

namespace {

inline float from_bits(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline float half(const uint8_t *bytes) { // float16, finite
  uint16_t stored;
  std::memcpy(&stored, bytes, 2);
  const uint32_t sign = uint32_t(stored & 0x8000) << 16, rest = uint32_t(stored & 0x7fff) << 13;
  return from_bits(sign | 0x77800000) * from_bits(rest); // 2^112 times it: exact, subnormals included
}

inline void put(float value, float &out) { out = value; }

inline void put(float value, uint16_t &out) { // bfloat16, to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  out = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Field {
  int64_t bits, width, group; // group: values that share a scale
  int64_t scales, zeros, codes; // bytes from a row's start; zeros: -1 where there are none
};

template <class Value> void decode_row(const Field &field, const uint8_t *row, Value *out) {
  const uint8_t *codes = row + field.codes;
  const int8_t *zeros = field.zeros < 0 ? nullptr : reinterpret_cast<const int8_t *>(row + field.zeros);
  for (int64_t group = 0, start = 0; start < field.width; group++, start += field.group) {
    const int64_t stop = start + field.group < field.width ? start + field.group : field.width;
    const float scale = half(row + field.scales + 2 * group);
    const int zero = (zeros ? zeros[group] : 0) + (field.bits == 4 ? 8 : 0);
    if (field.bits == 8) {
      for (int64_t i = start; i < stop; i++)
        put(float(int8_t(codes[i]) - zero) * scale, out[i]);
    } else if (start % 2 == 0) {
      for (int64_t i = start / 2; i < stop / 2; i++) {
        put(float((codes[i] & 15) - zero) * scale, out[2 * i]);
        put(float((codes[i] >> 4) - zero) * scale, out[2 * i + 1]);
      }
      if (stop % 2)
        put(float((codes[stop / 2] & 15) - zero) * scale, out[stop - 1]);
    } else {
      for (int64_t i = start; i < stop; i++)
        put(float((codes[i / 2] >> (i % 2 * 4) & 15) - zero) * scale, out[i]);
    }
  }
}

template <class Value>
void decode_rows(const Field &field, const uint8_t *rows, int64_t count, int64_t stride, int64_t threads, Value *out) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < count; row++)
    decode_row(field, rows + row * stride, out + row * field.width);
}

} // namespace

// Rows that begin `stride` bytes apart -> out [count, width], contiguous; is_bfloat16: float32 otherwise.
extern "C" void decode(const Field *field, const uint8_t *rows, int64_t count, int64_t stride, int64_t threads,
                       int64_t is_bfloat16, void *out) {
  if (is_bfloat16)
    decode_rows(*field, rows, count, stride, threads, static_cast<uint16_t *>(out));
  else
    decode_rows(*field, rows, count, stride, threads, static_cast<float *>(out));
}
