// Executes AMX instructions on a processor, or in a process, that may not: a library to preload (LD_PRELOAD).
//
// The processor raises an invalid-opcode fault (Linux: SIGILL) at a tile instruction when it has no AMX, or when the
// process never asked Linux for tile registers. The handler decodes the instruction, executes it on tiles in memory,
// with the checks of Intel's manual (shapes, configuration), counts it, and returns behind it. It knows LDTILECFG,
// STTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILELOADDT1, TILESTORED and TDPBF16PS; anything else ends the process.
// A processor with AMX executes the three that configure by itself; the handler then finds what they did in the state
// that Linux saved for the signal.
//
// amxemu_fault plants a fault into one tile register, so that tests of kernels can show that they would see it.
#define _GNU_SOURCE
#include <cpuid.h>
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

typedef struct {
  uint8_t rows[8];
  uint16_t bytes[8];
  int configured;
  uint8_t config[64];
  uint8_t data[8][16][64];
} Tiles;

typedef struct {
  int pp, op, reg, rm, vvvv, in_memory;
  int has_sib;
  uint64_t base, stride;
  const uint8_t* next;
} Instruction;

enum Count { kLoads, kStores, kZeros, kProducts, kConfigurations, kCounts };
enum Fault { kNone, kStride, kRows, kNoZero, kShortDepth };

static _Thread_local Tiles tiles;
static long counts[kCounts];
static int fault, faulty_tile;
static unsigned saved_at;  // where a saved state has the tile configuration; 0 without AMX

EXPORT int moe_lora_emulates_amx(void) { return 1; }
EXPORT long amxemu_count(int which) { return __atomic_load_n(&counts[which], __ATOMIC_RELAXED); }
EXPORT void amxemu_fault(int kind, int tile) { fault = kind, faulty_tile = tile; }

static int faulty(int kind, int tile) { return fault == kind && faulty_tile == tile; }
static void count(int which) { __atomic_add_fetch(&counts[which], 1, __ATOMIC_RELAXED); }

static void die(const char* reason, const uint8_t* code) {
  char text[160];
  const int n = snprintf(text, sizeof text, "amxemu: %s at %02x %02x %02x %02x %02x\n", reason, code[0], code[1], code[2],
                         code[3], code[4]);
  if (write(2, text, n) < 0) _exit(98);
  _exit(99);
}

static const int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// Decodes a three-byte VEX instruction of opcode map 0F38.
static Instruction decode(const uint8_t* code, const greg_t* registers) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || code[2] & 0x84) die("no AMX instruction", code);
  const int index_high = code[1] & 0x40 ? 0 : 8, base_high = code[1] & 0x20 ? 0 : 8, mod = code[4] >> 6, low = code[4] & 7;
  Instruction in = {.pp = code[2] & 3, .op = code[3], .reg = code[4] >> 3 & 7, .rm = low};
  in.vvvv = ~code[2] >> 3 & 15, in.in_memory = mod != 3, in.next = code + 5;
  if (!in.in_memory) return in;
  int base = low, wide = mod == 2;
  if (low == 4) {
    const uint8_t sib = *in.next++;
    const int index = (sib >> 3 & 7) | index_high;
    in.has_sib = 1, base = sib & 7;
    if (index != 4) in.stride = (uint64_t)registers[kRegisters[index]] << (sib >> 6);
  }
  const int absolute = mod == 0 && base == 5;  // a displacement alone, or from the next instruction on
  if (absolute) wide = 1;
  if (mod == 1) in.base = (uint64_t)(int64_t)(int8_t)*in.next++;
  if (wide) {
    int32_t displacement;
    memcpy(&displacement, in.next, 4);
    in.next += 4, in.base = (uint64_t)(int64_t)displacement;
  }
  if (!absolute)
    in.base += registers[kRegisters[base | base_high]];
  else if (!in.has_sib)
    in.base += (uint64_t)in.next;
  return in;
}

static void load_configuration(const uint8_t* from, const uint8_t* code) {
  memset(&tiles, 0, sizeof tiles);
  count(kConfigurations);
  if (from[0] == 0) return;
  if (from[0] != 1) die("palette must be 0 or 1 (#GP)", code);
  tiles.configured = 1;
  memcpy(tiles.config, from, 64);
  for (int i = 0; i < 8; ++i) {
    memcpy(&tiles.bytes[i], from + 16 + 2 * i, 2), tiles.rows[i] = from[48 + i];
    if (tiles.bytes[i] > 64 || tiles.rows[i] > 16) die("a tile is too large (#GP)", code);
  }
}

static void load(const Instruction* in) {
  const int t = in->reg, rows = tiles.rows[t] - faulty(kRows, t);
  const uint64_t stride = in->stride + (faulty(kStride, t) ? 64 : 0);
  memset(tiles.data[t], 0, sizeof tiles.data[t]);
  for (int r = 0; r < rows; ++r) memcpy(tiles.data[t][r], (const void*)(in->base + stride * r), tiles.bytes[t]);
  count(kLoads);
}

static void store(const Instruction* in) {
  const int t = in->reg, rows = tiles.rows[t] - faulty(kRows, t);
  const uint64_t stride = in->stride + (faulty(kStride, t) ? 64 : 0);
  for (int r = 0; r < rows; ++r) memcpy((void*)(in->base + stride * r), tiles.data[t][r], tiles.bytes[t]);
  count(kStores);
}

static float flushed(float x) { return fpclassify(x) == FP_SUBNORMAL ? copysignf(0, x) : x; }

static float half(const uint8_t* at) {
  uint32_t bits = (uint32_t)(at[0] | at[1] << 8) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return flushed(x);
}

// TDPBF16PS: sums of the even and of the odd elements apart, then both added to the destination.
static void multiply(int c, int a, int b, const uint8_t* code) {
  const int depth = tiles.bytes[a] / 4, columns = tiles.bytes[c] / 4;
  if (a == b || a == c || b == c) die("three different tiles are needed (#UD)", code);
  if (tiles.rows[c] != tiles.rows[a] || tiles.bytes[c] != tiles.bytes[b] || depth != tiles.rows[b])
    die("the tiles' shapes disagree (#UD)", code);
  for (int m = 0; m < tiles.rows[c]; ++m)
    for (int n = 0; n < columns; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < depth - (faulty(kShortDepth, a) || faulty(kShortDepth, b)); ++k) {
        const uint8_t *x = &tiles.data[a][m][4 * k], *y = &tiles.data[b][k][4 * n];
        even = flushed(fmaf(half(x), half(y), even)), odd = flushed(fmaf(half(x + 2), half(y + 2), odd));
      }
      memcpy(&sum, &tiles.data[c][m][4 * n], 4);
      sum = flushed(flushed(sum) + flushed(even + odd));
      memcpy(&tiles.data[c][m][4 * n], &sum, 4);
    }
  count(kProducts);
}

static void execute(const Instruction* in, const uint8_t* code) {
  if (in->op == 0x49 && in->in_memory && in->reg == 0 && in->pp == 0)
    return load_configuration((const uint8_t*)(in->base + in->stride), code);
  if (in->op == 0x49 && in->in_memory && in->reg == 0 && in->pp == 1) {
    memcpy((void*)(in->base + in->stride), tiles.config, 64);
    return;
  }
  if (in->op == 0x49 && !in->in_memory && in->pp == 0 && in->reg == 0 && in->rm == 0) {
    memset(&tiles, 0, sizeof tiles);
    return;
  }
  if (!tiles.configured) die("tiles are not configured (#UD)", code);
  if (in->op == 0x49 && !in->in_memory && in->pp == 3) {
    if (!faulty(kNoZero, in->reg)) memset(tiles.data[in->reg], 0, sizeof tiles.data[in->reg]);
    return count(kZeros);
  }
  if (in->op == 0x4b && in->has_sib && (in->pp == 3 || in->pp == 1)) return load(in);
  if (in->op == 0x4b && in->has_sib && in->pp == 2) return store(in);
  if (in->op == 0x5c && !in->in_memory && in->pp == 2) return multiply(in->reg, in->rm, in->vvvv, code);
  die("unknown instruction", code);
}

// The configuration that the processor itself holds.
static void follow_processor(const uint8_t* state, const uint8_t* code) {
  uint64_t present;
  memcpy(&present, state + 512, 8);
  if (!(present >> 17 & 1)) {
    memset(&tiles, 0, sizeof tiles);
  } else if (memcmp(tiles.config, state + saved_at, 64)) {
    load_configuration(state + saved_at, code);
  }
}

static void handle(int signal, siginfo_t* info, void* context) {
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* code = (const uint8_t*)registers[REG_RIP];
  if (saved_at) follow_processor((const uint8_t*)((ucontext_t*)context)->uc_mcontext.fpregs, code);
  const Instruction in = decode(code, registers);
  execute(&in, code);
  registers[REG_RIP] = (greg_t)in.next;
  (void)signal, (void)info;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGILL, &action, NULL);
  unsigned a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 24 & 1 && __get_cpuid_count(0xd, 17, &a, &b, &c, &d)) saved_at = b;
}
