/* One forward pass of a Llama-like decoder over packed tokens, on one thread, without any other library.
 *
 * Matrices are row-major [outputs, inputs], as torch's linear layers keep them, or of 4-bit codes: see Matrix. Weights
 * and the KV cache are of type `number` (float, or bfloat16 with -DBFLOAT16); everything in between is float. A token's
 * results depend neither on the tokens that it shares the pass with nor on their order: each sum runs over the same
 * terms in the same order.
 *
 * Vectors are GCC's, 512 bits wide, which any processor has: the compiler makes several of them where it must.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(BFLOAT16) && defined(__AVX512BF16__)
#include <immintrin.h>
#define PRODUCT_BFLOAT16 1 /* the processor multiplies pairs of bfloat16 */
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define ROWS 6 /* of the input, in one tile: 6 x 4 sums and their operands fill the 32 registers of AVX-512 */
#define MIDDLE 136.0f /* what a 4-bit code of 8 is read as */
#define SLAB 48 /* rows of the input that stay in the processor's cache while a matrix streams by */

typedef float vector __attribute__((vector_size(64)));
typedef float unaligned __attribute__((vector_size(64), aligned(4)));
typedef int32_t mask __attribute__((vector_size(64)));
typedef int32_t unaligned_mask __attribute__((vector_size(64), aligned(4)));

#ifdef BFLOAT16
typedef uint16_t number;
typedef uint16_t halves __attribute__((vector_size(32)));
typedef uint16_t unaligned_halves __attribute__((vector_size(32), aligned(2)));

INLINE vector load(const number *p) { /* a bfloat16 is the upper half of a float */
    halves h = *(const unaligned_halves *)p;
    return (vector)(__builtin_convertvector(h, mask) << 16);
}
INLINE float widen(number x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
INLINE number narrow(float f) { /* to the nearest, to even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if (f != f) return (number)(bits >> 16 | 64);
    return (number)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
typedef float number;
INLINE vector load(const number *p) { return *(const unaligned *)p; }
INLINE float widen(number x) { return x; }
INLINE number narrow(float f) { return f; }
#endif

INLINE vector get(const float *p) { return *(const unaligned *)p; }
INLINE void put(float *p, vector x) { *(unaligned *)p = x; }
INLINE vector all(float x) { return (vector){0} + x; }
INLINE vector pick(mask where, vector a, vector b) { return (vector)((where & (mask)a) | (~where & (mask)b)); }
INLINE vector greater(vector a, vector b) { return pick(a > b, a, b); }

INLINE float sum(vector x) { /* in halves */
    x += __builtin_shuffle(x, (mask){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    x += __builtin_shuffle(x, (mask){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    x += __builtin_shuffle(x, (mask){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    return x[0] + x[1];
}

/* e to the x: Cephes' expf, two rounding steps from the exact value at most. */
INLINE vector exponential(vector x) {
    x = pick(x < all(-87.0f), all(-87.0f), pick(x > all(88.0f), all(88.0f), x));
    vector shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's low bits are the rounded product */
    vector n = shifted - 12582912.0f;
    vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vector p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vector)((mask)p + ((mask)shifted << 23));
}

#ifdef PRODUCT_BFLOAT16
typedef number operand;
#define STEP 32 /* operands of one multiplication */
INLINE vector multiply_add(vector to, const operand *x, const number *w) {
    __m512bh a = (__m512bh)_mm512_loadu_si512(x), b = (__m512bh)_mm512_loadu_si512(w);
    return (vector)_mm512_dpbf16_ps((__m512)to, a, b);
}
#define EXCESS MIDDLE /* how much more than (code - 8) times the input `multiply_add_pair` adds */
INLINE vector multiply_add_pair(vector to, const operand *x, mask pair) {
    int32_t inputs;
    memcpy(&inputs, x, sizeof inputs);
    return (vector)_mm512_dpbf16_ps((__m512)to, (__m512bh)_mm512_set1_epi32(inputs), (__m512bh)pair);
}
INLINE vector load_operands(const operand *x) { return load(x); }
#else
typedef float operand;
#define STEP LANES
INLINE vector multiply_add(vector to, const operand *x, const number *w) { return to + get(x) * load(w); }
#define EXCESS 0.0f
INLINE vector multiply_add_pair(vector to, const operand *x, mask pair) {
    vector even = (vector)(pair << 16) - MIDDLE, odd = (vector)(pair & ~0xffff) - MIDDLE; /* exact */
    return to + even * x[0] + odd * x[1];
}
INLINE vector load_operands(const operand *x) { return get(x); }
#endif

/* y[rows, columns] = x[rows, size] w[columns, size]^T + bias; added to what y holds if `adds`. */
INLINE void tile(const operand *x, int64_t size, const number *w, const number *bias, float *y, int64_t stride,
                 int adds, const int rows, const int columns) {
    vector sums[ROWS][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) sums[i][j] = (vector){0};
    for (int64_t k = 0; k < size; k += STEP)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++)
                sums[i][j] = multiply_add(sums[i][j], x + i * size + k, w + j * size + k);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) {
            float value = sum(sums[i][j]) + (bias ? widen(bias[j]) : 0.0f);
            y[i * stride + j] = adds ? y[i * stride + j] + value : value;
        }
}

INLINE void tiles(const operand *x, int64_t rows, int64_t size, const number *w, const number *bias, float *y,
                  int64_t stride, int adds, const int columns) {
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * size, y += ROWS * stride)
        tile(x, size, w, bias, y, stride, adds, ROWS, columns);
    switch (rows) {
    case 5: tile(x, size, w, bias, y, stride, adds, 5, columns); break;
    case 4: tile(x, size, w, bias, y, stride, adds, 4, columns); break;
    case 3: tile(x, size, w, bias, y, stride, adds, 3, columns); break;
    case 2: tile(x, size, w, bias, y, stride, adds, 2, columns); break;
    case 1: tile(x, size, w, bias, y, stride, adds, 1, columns); break;
    }
}

/* A matrix as `number`s or, where it has scales, as 4-bit codes: a weight is (code - 8) * scale + offset, and each group
 * of inputs of one output shares a scale and an offset. */
typedef struct {
    const void *weights; /* number [outputs, inputs], or uint32_t [outputs / 16, inputs / 8, 16]: see code_tile */
    const number *bias, *scales, *offsets; /* [outputs] and [groups, outputs]; null if there are none */
    int64_t group_size;
} Matrix;

#define CODE_ROWS 4   /* of the input, in one tile of codes, */
#define CODE_BLOCKS 4 /* and blocks of 16 outputs */

/* As `tile`, for 16 * `blocks` outputs from `column` on. A word holds the codes of eight inputs, those of 2j and 2j + 1
 * from its bits 4j and 16 + 4j on. In the low bits of a bfloat16 of 128, a code c makes 128 + c, without any table.
 * `totals` [rows, groups] are the sums of each group's inputs, which offsets, and what 128 + c is too much, go by. */
INLINE void code_tile(const operand *x, const float *totals, int64_t size, const Matrix *matrix, int64_t column,
                      float *y, int64_t columns, int adds, const int rows, const int blocks) {
    const int32_t *words = (const int32_t *)matrix->weights + column * (size / 8);
    const int64_t groups = size / matrix->group_size;
    vector results[CODE_ROWS][CODE_BLOCKS];
    for (int i = 0; i < rows; i++)
        for (int b = 0; b < blocks; b++)
            results[i][b] = matrix->bias ? load(matrix->bias + column + b * LANES) : all(0.0f);
    for (int64_t g = 0; g < groups; g++) {
        vector sums[CODE_ROWS][CODE_BLOCKS];
        for (int i = 0; i < rows; i++)
            for (int b = 0; b < blocks; b++) sums[i][b] = all(0.0f);
        for (int64_t k = g * matrix->group_size; k < (g + 1) * matrix->group_size; k += 8)
            for (int b = 0; b < blocks; b++) {
                mask word = *(const unaligned_mask *)(words + b * LANES * (size / 8) + k * 2);
                for (int j = 0; j < 8; j += 2) {
                    mask pair = (word >> 2 * j & 0x000f000f) | 0x43004300;
                    for (int i = 0; i < rows; i++)
                        sums[i][b] = multiply_add_pair(sums[i][b], x + i * size + k + j, pair);
                }
            }
        for (int i = 0; i < rows; i++)
            for (int b = 0; b < blocks; b++) {
                int64_t at = g * columns + column + b * LANES;
                float total = totals[i * groups + g];
                results[i][b] += (sums[i][b] - EXCESS * total) * load(matrix->scales + at);
                results[i][b] += load(matrix->offsets + at) * total;
            }
    }
    for (int i = 0; i < rows; i++)
        for (int b = 0; b < blocks; b++) {
            float *to = y + i * columns + column + b * LANES;
            put(to, adds ? get(to) + results[i][b] : results[i][b]);
        }
}

INLINE void code_tiles(const operand *x, const float *totals, int64_t rows, int64_t size, const Matrix *matrix,
                       int64_t column, float *y, int64_t columns, int adds, const int blocks) {
    const int64_t groups = size / matrix->group_size;
    for (; rows >= CODE_ROWS; rows -= CODE_ROWS) {
        code_tile(x, totals, size, matrix, column, y, columns, adds, CODE_ROWS, blocks);
        x += CODE_ROWS * size, totals += CODE_ROWS * groups, y += CODE_ROWS * columns;
    }
    switch (rows) {
    case 3: code_tile(x, totals, size, matrix, column, y, columns, adds, 3, blocks); break;
    case 2: code_tile(x, totals, size, matrix, column, y, columns, adds, 2, blocks); break;
    case 1: code_tile(x, totals, size, matrix, column, y, columns, adds, 1, blocks); break;
    }
}

static void multiply_codes(const operand *x, int64_t rows, int64_t size, const Matrix *matrix, int64_t columns,
                           float *y, int adds, float *totals) {
    const int64_t group = matrix->group_size, groups = size / group;
    for (int64_t i = 0; i < rows * groups; i++) {
        vector total = all(0.0f);
        for (int64_t k = 0; k < group; k += LANES) total += load_operands(x + i * group + k);
        totals[i] = sum(total);
    }
    for (int64_t first = 0; first < rows; first += SLAB) {
        const operand *in = x + first * size;
        int64_t count = rows - first < SLAB ? rows - first : SLAB, j = 0;
        float *out = y + first * columns;
        for (; j + CODE_BLOCKS * LANES <= columns; j += CODE_BLOCKS * LANES)
            code_tiles(in, totals + first * groups, count, size, matrix, j, out, columns, adds, CODE_BLOCKS);
        for (; j < columns; j += LANES)
            code_tiles(in, totals + first * groups, count, size, matrix, j, out, columns, adds, 1);
    }
}

/* `scratch` has room for the operands and, behind them, a float for each 32. */
static void multiply(const float *x, int64_t rows, int64_t size, const Matrix *matrix, int64_t columns, float *y,
                     int adds, float *scratch) {
#ifdef PRODUCT_BFLOAT16
    operand *in = (operand *)scratch;
    for (int64_t i = 0; i < rows * size; i++) in[i] = narrow(x[i]);
#else
    const operand *in = x;
#endif
    if (matrix->scales) {
        multiply_codes(in, rows, size, matrix, columns, y, adds, scratch + rows * size);
        return;
    }
    const number *w = matrix->weights, *bias = matrix->bias;
    for (int64_t first = 0; first < rows; first += SLAB) {
        int64_t count = rows - first < SLAB ? rows - first : SLAB, j = 0;
        for (; j + 4 <= columns; j += 4)
            tiles(in + first * size, count, size, w + j * size, bias ? bias + j : 0, y + first * columns + j, columns,
                  adds, 4);
        for (; j < columns; j++)
            tiles(in + first * size, count, size, w + j * size, bias ? bias + j : 0, y + first * columns + j, columns,
                  adds, 1);
    }
}

/* Root mean square normalisation of one vector; `size` is a multiple of LANES. */
INLINE void normalise(const float *x, const number *weight, float epsilon, int64_t size, float *y) {
    vector squares = {0};
    for (int64_t i = 0; i < size; i += LANES) squares += get(x + i) * get(x + i);
    float scale = 1.0f / sqrtf(sum(squares) / (float)size + epsilon);
    for (int64_t i = 0; i < size; i += LANES) put(y + i, get(x + i) * scale * load(weight + i));
}

/* Rotary position embedding of one head, halves rotated together. */
INLINE void rotate(float *x, const float *cosine, const float *sine, int64_t size) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

typedef struct {
    const number *input_norm, *query_norm, *key_norm, *mlp_norm; /* a null query norm is none */
    Matrix qkv, output, gate_up, down;
    number *keys, *values; /* [slots, kv heads, head size] */
    int64_t window;        /* visible tokens, the querying one included; 0 for all */
} Layer;

typedef struct {
    int64_t num_layers, size, num_heads, num_kv_heads, head_size, mlp_size, vocabulary, block_size;
    float epsilon, scaling;
    const number *embedding, *norm;
    Matrix head;
    const Layer *layers;
} Model;

typedef struct {
    int64_t num_tokens, num_wanted;
    const int64_t *token_ids, *positions, *slots; /* by token */
    const int64_t *const *blocks;                 /* by token, the blocks of its sequence */
    const int64_t *wanted;                        /* tokens whose logits are made */
    const float *cosine, *sine;                   /* [positions, head size] */
} Tokens;

/* Attention of one query head over keys `begin` .. `end` - 1: scores, softmax, weighted values. */
INLINE void attend_head(const Model *model, const Layer *layer, const int64_t *blocks, int64_t begin, int64_t end,
                        int64_t kv_head, const float *query, float *scores, float *out, const int64_t size) {
    const int64_t stride = model->num_kv_heads * size, block_size = model->block_size;
    const int parts = (int)(size / LANES);
    vector most = all(-INFINITY);
    int64_t n = 0;
    for (int64_t i = begin; i < end;) {
        int64_t offset = i % block_size, stop = i + block_size - offset < end ? i + block_size - offset : end;
        const number *key = layer->keys + (blocks[i / block_size] * block_size + offset) * stride + kv_head * size;
        for (; i < stop; i++, key += stride) {
            vector products = {0};
            for (int k = 0; k < parts; k++) products += get(query + k * LANES) * load(key + k * LANES);
            scores[n++] = sum(products) * model->scaling;
        }
    }
    while (n % LANES) scores[n++] = -INFINITY;
    for (int64_t i = 0; i < n; i += LANES) most = greater(get(scores + i), most);
    float peak = most[0];
    for (int i = 1; i < LANES; i++) peak = most[i] > peak ? most[i] : peak;
    vector total = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        vector x = get(scores + i), weight = exponential(x - peak);
        weight = pick(x == all(-INFINITY), all(0.0f), weight);
        put(scores + i, weight);
        total += weight;
    }
    vector sums[16];
    for (int k = 0; k < parts; k++) sums[k] = (vector){0};
    n = 0;
    for (int64_t i = begin; i < end;) {
        int64_t offset = i % block_size, stop = i + block_size - offset < end ? i + block_size - offset : end;
        const number *value = layer->values + (blocks[i / block_size] * block_size + offset) * stride + kv_head * size;
        for (; i < stop; i++, value += stride, n++)
            for (int k = 0; k < parts; k++) sums[k] += scores[n] * load(value + k * LANES);
    }
    float scale = 1.0f / sum(total);
    for (int k = 0; k < parts; k++) put(out + k * LANES, sums[k] * scale);
}

static void attend(const Model *model, const Layer *layer, const Tokens *tokens, int64_t token, const float *query,
                   float *scores, float *out) {
    int64_t group = model->num_heads / model->num_kv_heads, size = model->head_size;
    int64_t end = tokens->positions[token] + 1;
    int64_t begin = layer->window && end > layer->window ? end - layer->window : 0;
    const int64_t *blocks = tokens->blocks[token];
    for (int64_t h = 0; h < model->num_heads; h++) {
        const float *q = query + h * size;
        float *o = out + h * size;
        switch (size) { /* a size that the compiler knows lets it keep the sums in registers */
        case 32: attend_head(model, layer, blocks, begin, end, h / group, q, scores, o, 32); break;
        case 64: attend_head(model, layer, blocks, begin, end, h / group, q, scores, o, 64); break;
        case 128: attend_head(model, layer, blocks, begin, end, h / group, q, scores, o, 128); break;
        default: attend_head(model, layer, blocks, begin, end, h / group, q, scores, o, size);
        }
    }
}

/* Floats of scratch memory that a pass takes, and nothing else does. */
int64_t scratch_size(const Model *model, int64_t num_tokens, int64_t longest) {
    int64_t qkv = (model->num_heads + 2 * model->num_kv_heads) * model->head_size;
    int64_t widest = model->mlp_size > model->size ? model->mlp_size : model->size;
    int64_t heads = model->num_heads * model->head_size;
    widest = heads > widest ? heads : widest;
    int64_t of_token = 2 * model->size + qkv + heads + 3 * model->mlp_size + widest + widest / 32;
    return num_tokens * of_token + longest + 2 * LANES;
}

/* Logits [num_wanted, vocabulary] of the wanted tokens; keys and values of all tokens are written to their slots.
 * Sizes of vectors are multiples of 32, a head's of 16 and at most 256. */
void forward(const Model *model, const Tokens *tokens, float *scratch, float *logits) {
    const int64_t count = tokens->num_tokens, size = model->size, head = model->head_size, mlp = model->mlp_size;
    const int64_t heads = model->num_heads * head, kv = model->num_kv_heads * head, qkv_size = heads + 2 * kv;
    float *hidden = scratch, *normed = hidden + count * size, *qkv = normed + count * size;
    float *attended = qkv + count * qkv_size, *gates = attended + count * heads, *acts = gates + count * 2 * mlp;
    float *operands = acts + count * mlp;
    int64_t widest = mlp > size ? mlp : size;
    widest = heads > widest ? heads : widest;
    float *scores = operands + count * (widest + widest / 32);

    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < size; i += LANES)
            put(hidden + t * size + i, load(model->embedding + tokens->token_ids[t] * size + i));
    for (int64_t l = 0; l < model->num_layers; l++) {
        const Layer *layer = &model->layers[l];
        for (int64_t t = 0; t < count; t++)
            normalise(hidden + t * size, layer->input_norm, model->epsilon, size, normed + t * size);
        multiply(normed, count, size, &layer->qkv, qkv_size, qkv, 0, operands);
        for (int64_t t = 0; t < count; t++) {
            float *row = qkv + t * qkv_size;
            for (int64_t h = 0; h < model->num_heads + model->num_kv_heads; h++) {
                const number *norm = h < model->num_heads ? layer->query_norm : layer->key_norm;
                if (norm) normalise(row + h * head, norm, model->epsilon, head, row + h * head);
                rotate(row + h * head, tokens->cosine + tokens->positions[t] * head,
                       tokens->sine + tokens->positions[t] * head, head);
            }
            for (int64_t i = 0; i < kv; i++) {
                layer->keys[tokens->slots[t] * kv + i] = narrow(row[heads + i]);
                layer->values[tokens->slots[t] * kv + i] = narrow(row[heads + kv + i]);
            }
        }
        for (int64_t t = 0; t < count; t++)
            attend(model, layer, tokens, t, qkv + t * qkv_size, scores, attended + t * heads);
        multiply(attended, count, heads, &layer->output, size, hidden, 1, operands);
        for (int64_t t = 0; t < count; t++)
            normalise(hidden + t * size, layer->mlp_norm, model->epsilon, size, normed + t * size);
        multiply(normed, count, size, &layer->gate_up, 2 * mlp, gates, 0, operands);
        for (int64_t t = 0; t < count; t++)
            for (int64_t i = 0; i < mlp; i += LANES) { /* SiLU of the gate, times the other half */
                vector gate = get(gates + 2 * t * mlp + i), up = get(gates + (2 * t + 1) * mlp + i);
                put(acts + t * mlp + i, gate / (1.0f + exponential(-gate)) * up);
            }
        multiply(acts, count, mlp, &layer->down, size, hidden, 1, operands);
    }
    for (int64_t i = 0; i < tokens->num_wanted; i++)
        normalise(hidden + tokens->wanted[i] * size, model->norm, model->epsilon, size, normed + i * size);
    multiply(normed, tokens->num_wanted, size, &model->head, model->vocabulary, logits, 0, operands);
}
