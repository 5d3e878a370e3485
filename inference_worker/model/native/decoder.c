/* One forward pass of a Llama-like decoder over packed tokens, on one thread, without any other library.
 *
 * Matrices are row-major [outputs, inputs], as torch's linear layers keep them. Weights and the KV cache are of type
 * `number` (float, or bfloat16 with -DBFLOAT16); everything in between is float. A token's results depend neither on the
 * tokens that it shares the pass with nor on their order: each sum runs over the same terms in the same order.
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
#define SLAB 48 /* rows of the input that stay in the processor's cache while a matrix streams by */

typedef float vector __attribute__((vector_size(64)));
typedef float unaligned __attribute__((vector_size(64), aligned(4)));
typedef int32_t mask __attribute__((vector_size(64)));

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
#else
typedef float operand;
#define STEP LANES
INLINE vector multiply_add(vector to, const operand *x, const number *w) { return to + get(x) * load(w); }
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

static void multiply(const float *x, int64_t rows, int64_t size, const number *w, const number *bias, int64_t columns,
                     float *y, int adds, operand *scratch) {
#ifdef PRODUCT_BFLOAT16
    for (int64_t i = 0; i < rows * size; i++) scratch[i] = narrow(x[i]);
    const operand *in = scratch;
#else
    const operand *in = x;
    (void)scratch;
#endif
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
    const number *input_norm, *qkv, *qkv_bias, *query_norm, *key_norm, *output, *output_bias;
    const number *mlp_norm, *gate_up, *gate_up_bias, *down, *down_bias; /* a null bias or query norm is none */
    number *keys, *values; /* [slots, kv heads, head size] */
    int64_t window;        /* visible tokens, the querying one included; 0 for all */
} Layer;

typedef struct {
    int64_t num_layers, size, num_heads, num_kv_heads, head_size, mlp_size, vocabulary, block_size;
    float epsilon, scaling;
    const number *embedding, *norm, *head, *head_bias;
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
    return num_tokens * (2 * model->size + qkv + heads + 3 * model->mlp_size + widest) + longest + 2 * LANES;
}

/* Logits [num_wanted, vocabulary] of the wanted tokens; keys and values of all tokens are written to their slots.
 * Sizes of vectors are multiples of 32, a head's of 16 and at most 256. */
void forward(const Model *model, const Tokens *tokens, float *scratch, float *logits) {
    const int64_t count = tokens->num_tokens, size = model->size, head = model->head_size, mlp = model->mlp_size;
    const int64_t heads = model->num_heads * head, kv = model->num_kv_heads * head, qkv_size = heads + 2 * kv;
    float *hidden = scratch, *normed = hidden + count * size, *qkv = normed + count * size;
    float *attended = qkv + count * qkv_size, *gates = attended + count * heads, *acts = gates + count * 2 * mlp;
    operand *narrowed = (operand *)(acts + count * mlp);
    int64_t widest = mlp > size ? mlp : size;
    widest = heads > widest ? heads : widest;
    float *scores = acts + count * (mlp + widest);

    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < size; i += LANES)
            put(hidden + t * size + i, load(model->embedding + tokens->token_ids[t] * size + i));
    for (int64_t l = 0; l < model->num_layers; l++) {
        const Layer *layer = &model->layers[l];
        for (int64_t t = 0; t < count; t++)
            normalise(hidden + t * size, layer->input_norm, model->epsilon, size, normed + t * size);
        multiply(normed, count, size, layer->qkv, layer->qkv_bias, qkv_size, qkv, 0, narrowed);
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
        multiply(attended, count, heads, layer->output, layer->output_bias, size, hidden, 1, narrowed);
        for (int64_t t = 0; t < count; t++)
            normalise(hidden + t * size, layer->mlp_norm, model->epsilon, size, normed + t * size);
        multiply(normed, count, size, layer->gate_up, layer->gate_up_bias, 2 * mlp, gates, 0, narrowed);
        for (int64_t t = 0; t < count; t++)
            for (int64_t i = 0; i < mlp; i += LANES) { /* SiLU of the gate, times the other half */
                vector gate = get(gates + 2 * t * mlp + i), up = get(gates + (2 * t + 1) * mlp + i);
                put(acts + t * mlp + i, gate / (1.0f + exponential(-gate)) * up);
            }
        multiply(acts, count, mlp, layer->down, layer->down_bias, size, hidden, 1, narrowed);
    }
    for (int64_t i = 0; i < tokens->num_wanted; i++)
        normalise(hidden + tokens->wanted[i] * size, model->norm, model->epsilon, size, normed + i * size);
    multiply(normed, tokens->num_wanted, size, model->head, model->head_bias, model->vocabulary, logits, 0, narrowed);
}
