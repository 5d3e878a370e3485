/* One forward pass of a Llama-like decoder over packed tokens, without any library but threads.
 *
 * Matrices are row-major [outputs, inputs], as torch's linear layers keep them, or of 4-bit codes: see Matrix. Weights
 * and the KV cache are of type `number` (numbers.h); everything in between is float. A token's results depend neither on the tokens that it shares
 * the pass with, nor on their order, nor on the number of threads: each sum runs over the same terms in the same order.
 */
#include "numbers.h"
#include "pool.h"

/* Rows of the input in one tile. 6 x 4 sums and their operands fill the 32 registers of AVX-512, 3 x 4 the 16 of AVX2. */
#if LANES == 16
#define ROWS 6
#else
#define ROWS 3
#endif
#define SLAB 48 /* rows of the input that stay in the processor's cache while a matrix streams by */
/* Bytes of weights that are on their way from memory. They are asked for in the order of their addresses, whatever order
 * they are used in, so that the processor's own prefetching follows; what lies past a matrix is mostly the next one. */
#define AHEAD 12288
#define LINE 64 /* bytes that come together */
#define GRAIN 32768 /* multiplications in a part of a task, at least: microseconds, so that taking it costs little */
#define PARTS 4     /* of a task for each thread, at most */

/* A matrix as `number`s or, where it has scales, as 4-bit codes: a weight is (code - 8) * scale + offset, and each group
 * of inputs of one output shares a scale and an offset. */
typedef struct {
    const void *weights; /* number [outputs, inputs], or uint32_t [outputs / 16, inputs / 8, 16]: see code_tile */
    const number *bias, *scales, *offsets; /* [outputs] and [groups, outputs]; null if there are none */
    int64_t group_size;
} Matrix;

typedef struct {
    const number *input_norm, *query_norm, *key_norm, *mlp_norm; /* a null query norm is none */
    Matrix qkv, output, gate_up, down;
    number *keys, *values; /* [slots, kv heads, head size] */
    int64_t window;        /* visible tokens, the querying one included; 0 for all */
} Layer;

typedef struct {
    int64_t num_layers, size, num_heads, num_kv_heads, head_size, mlp_size, vocabulary, block_size, num_blocks;
    int64_t num_embeddings;
    float epsilon, scaling;
    const number *embedding, *norm;
    Matrix head;
    const Layer *layers;
} Model;

typedef struct {
    int64_t num_tokens, num_wanted, num_positions;
    const int64_t *token_ids, *positions, *slots; /* by token */
    const int64_t *const *blocks;                 /* by token, the blocks of its sequence */
    const int64_t *widths;                        /* by token, how many blocks are given */
    const int64_t *wanted;                        /* tokens whose logits are made, in any order, also repeatedly */
    const float *cosine, *sine;                   /* [num_positions, head size] */
} Tokens;

/* y[rows, columns] = x[rows, size] matrix[columns, size]^T + bias; added to what y holds if `adds`. */
typedef struct {
    const operand *x;
    const float *totals; /* of 4-bit codes: see code_tile */
    const Matrix *matrix;
    float *y;
    int64_t rows, size, columns, columns_of_part;
    int adds;
} Product;

/* What the tasks of a pass work on. Rows are the pass's tokens; in the last layer, from its attention on, those whose
 * logits are wanted. */
typedef struct {
    const Model *model;
    const Tokens *tokens;
    const Layer *layer;
    const int64_t *token_of; /* by row; null: row i is token i */
    int64_t rows, rows_of_part, heads_of_part, longest;
    float *hidden, *chosen, *normed, *qkv, *attended, *gates, *acts, *scores;
    float *operands; /* and, behind those of all rows, a float for each 32 */
    Product product;
} Pass;

/* How many of `count` equal items make a part. */
INLINE int64_t part_size(const Pool *pool, int64_t count, int64_t cost) {
    if (!pool) return most(count, 1);
    return most(divide_up(count, PARTS * num_workers(pool)), divide_up(GRAIN, cost));
}

INLINE void fetch(const void *weights) { __builtin_prefetch((const char *)weights + AHEAD); }

INLINE void tile(const operand *x, int64_t size, const number *w, const number *bias, float *y, int64_t stride,
                 int adds, const int rows, const int columns) {
    vector sums[ROWS][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) sums[i][j] = (vector){0};
    for (int64_t k = 0; k < size; k += STEP) {
        for (size_t b = 0; b < columns * STEP * sizeof *w; b += LINE) fetch((const char *)(w + k * columns) + b);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++)
                sums[i][j] = multiply_add(sums[i][j], x + i * size + k, w + j * size + k);
    }
    for (int i = 0; i < rows; i++) {
        four totals = columns == 4 ? sums_of_four(sums[i][0], sums[i][1], sums[i][2], sums[i][3]) : (four){sum(sums[i][0])};
        for (int j = 0; j < columns; j++) {
            float value = totals[j] + (bias ? widen(bias[j]) : 0.0f);
            y[i * stride + j] = adds ? y[i * stride + j] + value : value;
        }
    }
}

INLINE void tiles(const operand *x, int64_t rows, int64_t size, const number *w, const number *bias, float *y,
                  int64_t stride, int adds, const int columns) {
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * size, y += ROWS * stride)
        tile(x, size, w, bias, y, stride, adds, ROWS, columns);
    switch (rows) {
#if ROWS == 6
    case 5: tile(x, size, w, bias, y, stride, adds, 5, columns); break;
    case 4: tile(x, size, w, bias, y, stride, adds, 4, columns); break;
    case 3: tile(x, size, w, bias, y, stride, adds, 3, columns); break;
#endif
    case 2: tile(x, size, w, bias, y, stride, adds, 2, columns); break;
    case 1: tile(x, size, w, bias, y, stride, adds, 1, columns); break;
    }
}

#define BLOCK 16 /* outputs whose codes stand together, */
#define VECTORS (BLOCK / LANES)
#if LANES == 16
#define CODE_ROWS 4 /* rows of the input in one tile of codes, */
#define CODE_BLOCKS 4
#else
#define CODE_ROWS 2
#define CODE_BLOCKS 2
#endif

/* As `tile`, for `blocks` blocks of outputs from `column` on. A word holds the codes of eight inputs, those of 2j and 2j + 1
 * from its bits 4j and 16 + 4j on. In the low bits of a bfloat16 of 128, a code c makes 128 + c, without any table.
 * `totals` [rows, groups] are the sums of each group's inputs, which offsets, and what 128 + c is too much, go by. */
INLINE void code_tile(const operand *x, const float *totals, int64_t size, const Matrix *matrix, int64_t column,
                      float *y, int64_t columns, int adds, const int rows, const int blocks) {
    const int32_t *words = (const int32_t *)matrix->weights + column * (size / 8);
    const int64_t groups = size / matrix->group_size;
    const int count = blocks * VECTORS; /* vector v is of block v / VECTORS */
    vector results[CODE_ROWS][CODE_BLOCKS * VECTORS];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < count; v++)
            results[i][v] = matrix->bias ? load(matrix->bias + column + v * LANES) : all(0.0f);
    for (int64_t g = 0; g < groups; g++) {
        vector sums[CODE_ROWS][CODE_BLOCKS * VECTORS];
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < count; v++) sums[i][v] = all(0.0f);
        for (int64_t k = g * matrix->group_size; k < (g + 1) * matrix->group_size; k += 8) {
            for (int b = 0; b < blocks; b++) fetch(words + (k * 2 * blocks + b * BLOCK));
            for (int v = 0; v < count; v++) {
                const int32_t *at = words + v / VECTORS * BLOCK * (size / 8) + k * 2 + v % VECTORS * LANES;
                mask word = *(const unaligned_mask *)at;
                for (int j = 0; j < 8; j += 2) {
                    mask pair = (word >> 2 * j & 0x000f000f) | 0x43004300;
                    for (int i = 0; i < rows; i++)
                        sums[i][v] = multiply_add_pair(sums[i][v], x + i * size + k + j, pair);
                }
            }
        }
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < count; v++) {
                int64_t at = g * columns + column + v * LANES;
                float total = totals[i * groups + g];
                results[i][v] += (sums[i][v] - EXCESS * total) * load(matrix->scales + at);
                results[i][v] += load(matrix->offsets + at) * total;
            }
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < count; v++) {
            float *to = y + i * columns + column + v * LANES;
            put(to, adds ? get(to) + results[i][v] : results[i][v]);
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
#if CODE_ROWS == 4
    case 3: code_tile(x, totals, size, matrix, column, y, columns, adds, 3, blocks); break;
    case 2: code_tile(x, totals, size, matrix, column, y, columns, adds, 2, blocks); break;
#endif
    case 1: code_tile(x, totals, size, matrix, column, y, columns, adds, 1, blocks); break;
    }
}

static void multiply_part(const void *argument, int64_t part, int64_t worker) {
    const Product p = ((const Pass *)argument)->product;
    const Matrix *m = p.matrix;
    const int64_t begin = part * p.columns_of_part, end = least(begin + p.columns_of_part, p.columns);
    (void)worker;
    for (int64_t first = 0; first < p.rows; first += SLAB) {
        int64_t count = least(p.rows - first, SLAB), j = begin;
        const operand *x = p.x + first * p.size;
        float *y = p.y + first * p.columns;
        if (m->scales) {
            const float *totals = p.totals + first * (p.size / m->group_size);
            for (; j + CODE_BLOCKS * BLOCK <= end; j += CODE_BLOCKS * BLOCK)
                code_tiles(x, totals, count, p.size, m, j, y, p.columns, p.adds, CODE_BLOCKS);
            for (; j < end; j += BLOCK) code_tiles(x, totals, count, p.size, m, j, y, p.columns, p.adds, 1);
            continue;
        }
        const number *w = m->weights, *bias = m->bias;
        for (; j + 4 <= end; j += 4)
            tiles(x, count, p.size, w + j * p.size, bias ? bias + j : 0, y + j, p.columns, p.adds, 4);
        for (; j < end; j++) tiles(x, count, p.size, w + j * p.size, bias ? bias + j : 0, y + j, p.columns, p.adds, 1);
    }
}

static void add_up_groups(const operand *x, int64_t count, int64_t group, float *totals) {
    for (int64_t i = 0; i < count; i++) {
        vector total = all(0.0f);
        for (int64_t k = 0; k < group; k += LANES) total += load_operands(x + i * group + k);
        totals[i] = sum(total);
    }
}

static void multiply(Pool *pool, Pass *pass, const float *x, int64_t size, const Matrix *matrix, int64_t columns,
                     float *y, int adds) {
    const int64_t rows = pass->rows, unit = matrix->scales ? CODE_BLOCKS * BLOCK : 4;
    float *totals = pass->operands + rows * size;
#ifdef PRODUCT_BFLOAT16
    operand *in = (operand *)pass->operands;
    for (int64_t i = 0; i < rows * size; i++) in[i] = narrow(x[i]);
#else
    const operand *in = x;
#endif
    if (matrix->scales) add_up_groups(in, rows * (size / matrix->group_size), matrix->group_size, totals);
    int64_t each = unit * part_size(pool, divide_up(columns, unit), unit * most(rows, 1) * size);
    pass->product = (Product){in, totals, matrix, y, rows, size, columns, each, adds};
    share(pool, multiply_part, pass, divide_up(columns, each));
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
    vector sums[256 / LANES];
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

INLINE void attend(const Pass *pass, int64_t row, int64_t h, int64_t worker) {
    const Model *model = pass->model;
    const int64_t size = model->head_size, group = model->num_heads / model->num_kv_heads;
    const int64_t token = pass->token_of ? pass->token_of[row] : row;
    const int64_t end = pass->tokens->positions[token] + 1, window = pass->layer->window;
    const int64_t begin = window && end > window ? end - window : 0;
    const int64_t *blocks = pass->tokens->blocks[token];
    const float *q = pass->qkv + (token * (model->num_heads + 2 * model->num_kv_heads) + h) * size;
    float *o = pass->attended + (row * model->num_heads + h) * size;
    float *scores = pass->scores + worker * (pass->longest + 2 * LANES);
    switch (size) { /* a size that the compiler knows lets it keep the sums in registers */
    case 32: attend_head(model, pass->layer, blocks, begin, end, h / group, q, scores, o, 32); break;
    case 64: attend_head(model, pass->layer, blocks, begin, end, h / group, q, scores, o, 64); break;
    case 128: attend_head(model, pass->layer, blocks, begin, end, h / group, q, scores, o, 128); break;
    default: attend_head(model, pass->layer, blocks, begin, end, h / group, q, scores, o, size);
    }
}

static void attend_part(const void *argument, int64_t part, int64_t worker) {
    const Pass *pass = argument;
    const int64_t num_heads = pass->model->num_heads, begin = part * pass->heads_of_part;
    const int64_t end = least(begin + pass->heads_of_part, pass->rows * num_heads);
    for (int64_t i = begin; i < end; i++) attend(pass, i / num_heads, i % num_heads, worker);
}

/* Rotate a part of the tokens' queries and keys, and write keys and values to the cache. */
static void place_part(const void *argument, int64_t part, int64_t worker) {
    const Pass *pass = argument;
    const Model *model = pass->model;
    const Layer *layer = pass->layer;
    const Tokens *tokens = pass->tokens;
    const int64_t size = model->head_size, heads = model->num_heads * size, kv = model->num_kv_heads * size;
    (void)worker;
    for (int64_t t = part * pass->rows_of_part; t < least((part + 1) * pass->rows_of_part, pass->rows); t++) {
        float *row = pass->qkv + t * (heads + 2 * kv);
        for (int64_t h = 0; h < model->num_heads + model->num_kv_heads; h++) {
            const number *norm = h < model->num_heads ? layer->query_norm : layer->key_norm;
            if (norm) normalise(row + h * size, norm, model->epsilon, size, row + h * size);
            rotate(row + h * size, tokens->cosine + tokens->positions[t] * size,
                   tokens->sine + tokens->positions[t] * size, size);
        }
        for (int64_t i = 0; i < kv; i++) {
            layer->keys[tokens->slots[t] * kv + i] = narrow(row[heads + i]);
            layer->values[tokens->slots[t] * kv + i] = narrow(row[heads + kv + i]);
        }
    }
}

/* SiLU of the gates, times the other halves, for a part of the rows. */
static void activate_part(const void *argument, int64_t part, int64_t worker) {
    const Pass *pass = argument;
    const int64_t mlp = pass->model->mlp_size;
    (void)worker;
    for (int64_t t = part * pass->rows_of_part; t < least((part + 1) * pass->rows_of_part, pass->rows); t++)
        for (int64_t i = 0; i < mlp; i += LANES) {
            vector gate = get(pass->gates + 2 * t * mlp + i), up = get(pass->gates + (2 * t + 1) * mlp + i);
            put(pass->acts + t * mlp + i, gate / (1.0f + exponential(-gate)) * up);
        }
}

/* Share out a task over all rows, of so many operations each. */
static void share_rows(Pool *pool, Pass *pass, Part task, int64_t cost) {
    pass->rows_of_part = part_size(pool, pass->rows, cost);
    share(pool, task, pass, divide_up(pass->rows, pass->rows_of_part));
}

static void normalise_rows(Pass *pass, const number *weight) {
    const int64_t size = pass->model->size;
    for (int64_t i = 0; i < pass->rows; i++)
        normalise(pass->hidden + i * size, weight, pass->model->epsilon, size, pass->normed + i * size);
}

/* From here on the rows are the wanted tokens. */
static void choose(Pass *pass) {
    const int64_t size = pass->model->size;
    pass->token_of = pass->tokens->wanted;
    pass->rows = pass->tokens->num_wanted;
    for (int64_t i = 0; i < pass->rows; i++)
        memcpy(pass->chosen + i * size, pass->hidden + pass->token_of[i] * size, (size_t)size * sizeof(float));
    pass->hidden = pass->chosen;
}

static void run_layer(Pool *pool, Pass *pass, const Layer *layer, int is_last) {
    const Model *model = pass->model;
    const int64_t size = model->size, mlp = model->mlp_size, heads = model->num_heads * model->head_size;
    const int64_t qkv_size = heads + 2 * model->num_kv_heads * model->head_size;
    pass->layer = layer;
    normalise_rows(pass, layer->input_norm);
    multiply(pool, pass, pass->normed, size, &layer->qkv, qkv_size, pass->qkv, 0);
    share_rows(pool, pass, place_part, 4 * qkv_size);
    if (is_last) choose(pass); /* the other tokens' keys and values are all that is needed of them */
    pass->heads_of_part = part_size(pool, pass->rows * model->num_heads, 2 * model->head_size * pass->longest);
    share(pool, attend_part, pass, divide_up(pass->rows * model->num_heads, pass->heads_of_part));
    multiply(pool, pass, pass->attended, heads, &layer->output, size, pass->hidden, 1);
    normalise_rows(pass, layer->mlp_norm);
    multiply(pool, pass, pass->normed, size, &layer->gate_up, 2 * mlp, pass->gates, 0);
    share_rows(pool, pass, activate_part, 8 * mlp);
    multiply(pool, pass, pass->acts, mlp, &layer->down, size, pass->hidden, 1);
}

/* Lay out the buffers of a pass from `memory` on; how many floats they take. */
static int64_t lay_out(Pass *pass, float *memory, int64_t num_tokens, int64_t num_wanted, int64_t num_workers) {
    const Model *model = pass->model;
    const int64_t heads = model->num_heads * model->head_size, kv = model->num_kv_heads * model->head_size;
    const int64_t rows = most(num_tokens, num_wanted), widest = most(most(model->mlp_size, model->size), heads);
    float **const buffers[] = {&pass->hidden,   &pass->chosen, &pass->normed, &pass->qkv,
                               &pass->attended, &pass->gates,  &pass->acts};
    const int64_t sizes[] = {model->size, model->size,          model->size,    heads + 2 * kv,
                             heads,       2 * model->mlp_size, model->mlp_size};
    int64_t total = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; total += rows * sizes[i], i++)
        *buffers[i] = memory ? memory + total : 0;
    pass->operands = memory ? memory + total : 0;
    total += rows * (widest + widest / 32);
    pass->scores = memory ? memory + total : 0;
    return total + num_workers * (pass->longest + 2 * LANES);
}

/* Floats of scratch memory that a pass takes; `longest` is the last position, plus 1. */
int64_t scratch_size(const Model *model, int64_t num_tokens, int64_t num_wanted, int64_t longest, int64_t num_threads) {
    Pass pass = {.model = model, .longest = longest};
    return lay_out(&pass, 0, num_tokens, num_wanted, num_threads);
}

/* What of the tokens lies outside of what there is, or null. */
static const char *find_fault(const Model *model, const Tokens *tokens) {
    for (int64_t t = 0; t < tokens->num_tokens; t++) {
        const int64_t position = tokens->positions[t], slot = tokens->slots[t], *blocks = tokens->blocks[t];
        if (tokens->token_ids[t] < 0 || tokens->token_ids[t] >= model->num_embeddings) return "a token id";
        if (position < 0 || position >= tokens->num_positions) return "a position";
        if (slot < 0 || slot >= model->num_blocks * model->block_size) return "a slot";
        if (!blocks || position / model->block_size >= tokens->widths[t]) return "a position in a block table";
        if (t && blocks == tokens->blocks[t - 1] && position == tokens->positions[t - 1] + 1 &&
            position % model->block_size)
            continue; /* the blocks of the token before */
        for (int64_t i = 0; i <= position / model->block_size; i++)
            if (blocks[i] < 0 || blocks[i] >= model->num_blocks) return "a block";
    }
    for (int64_t i = 0; i < tokens->num_wanted; i++)
        if (tokens->wanted[i] < 0 || tokens->wanted[i] >= tokens->num_tokens) return "a wanted token";
    return 0;
}

/* Logits [num_wanted, vocabulary] of the wanted tokens; keys and values of all tokens are written to their slots.
 * Sizes of vectors are multiples of 32, a head's of 16 and at most 256. `pool` is null for one thread, and runs one
 * pass at a time. Returns what is out of range, with nothing done, or null. */
const char *forward(const Model *model, const Tokens *tokens, float *scratch, float *logits, Pool *pool) {
    const char *fault = find_fault(model, tokens);
    if (fault) return fault;
    const int64_t size = model->size;
    Pass pass = {.model = model, .tokens = tokens, .rows = tokens->num_tokens};
    for (int64_t t = 0; t < tokens->num_tokens; t++) pass.longest = most(pass.longest, tokens->positions[t] + 1);
    lay_out(&pass, scratch, tokens->num_tokens, tokens->num_wanted, num_workers(pool));
    set_active(pool, 1);
    for (int64_t t = 0; t < tokens->num_tokens; t++)
        for (int64_t i = 0; i < size; i += LANES)
            put(pass.hidden + t * size + i, load(model->embedding + tokens->token_ids[t] * size + i));
    for (int64_t l = 0; l < model->num_layers; l++)
        run_layer(pool, &pass, &model->layers[l], l == model->num_layers - 1);
    normalise_rows(&pass, model->norm);
    multiply(pool, &pass, pass.normed, size, &model->head, model->vocabulary, logits, 0);
    set_active(pool, 0);
    return 0;
}
