/* Passes over rows of logits, for drawing from them: see scans.py. A row is read from memory once, and is in the
 * processor's cache from then on, as is what is written of its size. What comes of a row follows from that row alone. */
#include <float.h>
#include <stdlib.h>

#include "numbers.h"

#define GROUPS 512   /* of a row's logits, logit i in group i modulo their number */
#define SUMMED 256   /* weights that are added up as floats, before doubles take over */
#define SLACK 1e-5   /* how far below a floor candidates begin, relative to the logits: their scores are rounded */
#define HALVINGS_OF_ALL 6 /* of the bracket of top-p: each takes a pass over the row, and halves what is left of it */
#define HALVINGS_OF_FEW 8 /* each takes a pass over what is left after those */
#define LOWEST -87.0f /* `exponential` goes no lower */

INLINE vector get_until(const float *logits, int64_t i, int64_t end) {
    return i + LANES <= end ? get(logits + i) : get_some(logits + i, end - i);
}

/* Of the logits [begin, end) the scores, (logit - peak) / temperature, and the weights, e to the score and 0 below
 * e^LOWEST. Both are written up to a multiple of LANES: minus infinity and 0 past `end`. Returns the weights' sum. */
INLINE float weigh(const float *logits, int64_t begin, int64_t end, float peak, float temperature, float *scores,
                   float *weights) {
    vector total = all(0.0f);
    for (int64_t i = begin; i < end; i += LANES) {
        vector score = get_until(logits, i, end) - peak;
        if (temperature != 1.0f) score /= temperature;
        vector weight = pick(score < all(LOWEST), all(0.0f), exponential(score));
        put(scores + i, score), put(weights + i, weight);
        total += weight;
    }
    return sum(total);
}

/* The same for a whole row. */
static double weigh_row(const float *logits, int64_t vocabulary, float peak, float temperature, float *scores,
                        float *weights) {
    double total = 0.0;
    for (int64_t i = 0; i < vocabulary; i += SUMMED)
        total += (double)weigh(logits, i, least(i + SUMMED, vocabulary), peak, temperature, scores, weights);
    return total;
}

/* The greatest logit of each group and, as the result, of all; NaN if there is one. */
static float find_peaks(const float *logits, int64_t vocabulary, float *peaks) {
    for (int64_t g = 0; g < GROUPS; g += LANES) put(peaks + g, all(-INFINITY));
    for (int64_t first = 0; first < vocabulary; first += GROUPS)
        for (int64_t g = 0; g < least(GROUPS, vocabulary - first); g += LANES) {
            vector x = get_until(logits, first + g, vocabulary), most = get(peaks + g);
            put(peaks + g, pick((x > most) | (x != x), x, most));
        }
    float peak = -INFINITY;
    for (int64_t g = 0; g < GROUPS; g++) peak = peaks[g] > peak || peaks[g] != peaks[g] ? peaks[g] : peak;
    return peak;
}

/* To integers that are in the order of the numbers, of which none is NaN; and back, from the same bits. */
INLINE mask order(mask bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

/* The k-th greatest of the groups' peaks, by bisection. */
static float find_kth(const float *peaks, int64_t k) {
    int64_t low = INT32_MIN, high = INT32_MAX;
    while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        mask counts = {0};
        for (int64_t g = 0; g < GROUPS; g += LANES) counts -= order((mask)get(peaks + g)) >= (int32_t)middle;
        int64_t count = 0;
        for (int i = 0; i < LANES; i++) count += counts[i];
        if (count >= k)
            low = middle;
        else
            high = middle - 1;
    }
    return ((vector)order((mask){0} + (int32_t)low))[0];
}

/* The ids of the logits that are `bound` or more, ascending, and these logits; how many there are, or a number above
 * `most` if there are more than that, which are not all kept. */
static int64_t find_from(const float *logits, int64_t vocabulary, float bound, int64_t most, int64_t *ids,
                         float *values) {
    int64_t count = 0;
    for (int64_t i = 0; i < vocabulary && count <= most; i += LANES)
        for (uint32_t bits = lanes_from(get_until(logits, i, vocabulary), bound); bits; bits &= bits - 1, count++) {
            if (count >= most) continue;
            ids[count] = i + __builtin_ctz(bits);
            values[count] = logits[ids[count]];
        }
    return count;
}

/* Whether the candidates surely have less than this share of a row's mass: even of that of the groups' peaks. */
static int lacks_mass(const float *candidates, int64_t count, const float *groups, float peak, float temperature,
                      double share, float *scores, float *weights) {
    const double peaks = (double)weigh(groups, 0, GROUPS, peak, temperature, scores, weights);
    /* rounding must not open a row that is certain: another scan might not */
    return weigh_row(candidates, count, peak, temperature, scores, weights) < 0.99 * share * peaks;
}

/* Of each row of `logits` [rows, vocabulary] its peak and, unless `firsts` is negative or the peak is not finite, its
 * candidates. They are the logits from a bound on, which is the greater of two: the first-th greatest of the groups'
 * peaks, if that is not 0, and the floor, which lies `depths` below the peak. `ids` and `values` [rows, most] take
 * them, and minus infinities behind them up to the width that they have together, which is the result; `counts` says
 * how many there were, and `is_floor` whether the floor was the bound. `masses` is the sum of all weights of the rows
 * of which a share is wanted; one whose candidates surely lack it has none. What a row has none of is 0. `scores` and
 * `weights` are room for as many as a row has, but for GROUPS and `most` at least, rounded up to LANES. */
int64_t survey(int64_t rows, int64_t vocabulary, int64_t most, const float *logits, const int64_t *firsts,
               const double *depths, const float *temperatures, const double *shares, float *scores, float *weights,
               float *peaks, int64_t *ids, float *values, int64_t *counts, double *masses, uint8_t *is_floor) {
    int64_t width = 0;
    for (int64_t row = 0; row < rows; row++, logits += vocabulary) {
        float groups[GROUPS], *found = values + row * most;
        const float peak = peaks[row] = find_peaks(logits, vocabulary, groups), temperature = temperatures[row];
        counts[row] = 0, masses[row] = 0.0, is_floor[row] = 0;
        if (firsts[row] < 0 || !isfinite(peak)) continue;
        const double floor = peak - depths[row] - SLACK * (fabs((double)peak) + depths[row]);
        float bound = firsts[row] > 0 ? find_kth(groups, firsts[row]) : -INFINITY;
        is_floor[row] = isfinite(depths[row]) && floor >= bound;
        if (is_floor[row]) bound = (float)floor;
        if (bound == -INFINITY) bound = -FLT_MAX; /* a forbidden token is no candidate */
        counts[row] = find_from(logits, vocabulary, bound, most, ids + row * most, found);
        if (shares[row] > 0.0 && counts[row] <= most) {
            if (!is_floor[row] && lacks_mass(found, counts[row], groups, peak, temperature, shares[row], scores, weights))
                counts[row] = 0;
            else
                masses[row] = weigh_row(logits, vocabulary, peak, temperature, scores, weights);
        }
        width = counts[row] > width ? least(counts[row], most) : width;
    }
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = counts[row]; i < width; i++) ids[row * most + i] = 0, values[row * most + i] = -INFINITY;
    return width;
}

/* The sum of the weights [begin, end) whose scores are `bound` or more, in the order of `weigh`. */
INLINE float mass_between(const float *scores, const float *weights, int64_t begin, int64_t end, float bound) {
    vector total = all(0.0f);
    for (int64_t i = begin; i < end; i += LANES)
        total += pick(get(scores + i) >= bound, get(weights + i), all(0.0f));
    return sum(total);
}

typedef struct {
    float low, high; /* scores; it lies from `low` on and below `high` */
    double above;    /* the mass from `high` on, which is not enough */
} bracket;

/* Halves the bracket in which the last survivor lies. `others` is the mass above it that is not of these scores. */
static bracket narrow_down(bracket b, const float *scores, const float *weights, int64_t count, double wanted,
                           double others, int halvings) {
    for (; halvings > 0; halvings--) {
        const float middle = b.low + (b.high - b.low) / 2;
        double mass = others;
        for (int64_t i = 0; i < count; i += SUMMED)
            mass += (double)mass_between(scores, weights, i, least(i + SUMMED, count), middle);
        if (mass < wanted)
            b.high = middle, b.above = mass;
        else
            b.low = middle;
    }
    return b;
}

/* Keeps the scores that lie in the bracket, in `kept`, which may be the same array: how many there are. */
static int64_t keep_inside(bracket b, const float *scores, int64_t count, float *kept) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; i += LANES) {
        const vector x = get_until(scores, i, count);
        found += put_lanes(kept + found, x, lanes_from(x, b.low) & ~lanes_from(x, b.high));
    }
    return found;
}

static int descending(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* The least score that top-p leaves of a row, by the rule of truncation.py: by bisection, among all and then among the
 * few that are left, of which in the end a handful is sorted, or more where they are alike. `room` is for twice as many
 * numbers as a row has, rounded up to LANES. */
static float find_last_survivor(const float *scores, const float *weights, int64_t vocabulary, double total,
                                double share, float *room) {
    const double wanted = share * total;
    float *const room_weights = room + divide_up(vocabulary, LANES) * LANES;
    /* were all scores as great as the lowest here, they would not weigh more together than what may be cut */
    const double lowest = log(0.99 * (1.0 - share) * total / (double)vocabulary);
    bracket b = {lowest > LOWEST ? (float)lowest : LOWEST, 1.0f, 0.0};
    b = narrow_down(b, scores, weights, vocabulary, wanted, 0.0, HALVINGS_OF_ALL);
    int64_t count = keep_inside(b, scores, vocabulary, room);
    weigh_row(room, count, 0.0f, 1.0f, room, room_weights);
    b = narrow_down(b, room, room_weights, count, wanted, b.above, HALVINGS_OF_FEW);
    count = keep_inside(b, room, count, room);
    qsort(room, (size_t)count, sizeof *room, descending);
    double mass = b.above;
    float last = count > 0 ? room[0] : b.low;
    for (int64_t i = 0; i < count && mass < wanted; i++) mass += exp((double)(last = room[i]));
    return last;
}

/* The inverse at `u` of the cumulative distribution over the scores from `lowest` on, in the order of token ids. `ends`
 * is room for a number for every SUMMED tokens, and one more. */
static int64_t invert(const float *scores, const float *weights, int64_t vocabulary, float lowest, double u,
                      double *ends) {
    int64_t group = 0;
    ends[0] = 0.0;
    for (int64_t g = 0; g * SUMMED < vocabulary; g++) {
        const int64_t begin = g * SUMMED, end = least(begin + SUMMED, vocabulary);
        ends[g + 1] = ends[g] + (double)mass_between(scores, weights, begin, end, lowest);
    }
    const double total = ends[divide_up(vocabulary, SUMMED)], target = fmin(u * total, nextafter(total, 0.0));
    while (ends[group + 1] <= target) group++;
    double sums[SUMMED], inside = 0.0;
    const int64_t begin = group * SUMMED, count = least(SUMMED, vocabulary - begin);
    for (int64_t k = 0; k < count; k++)
        sums[k] = inside += scores[begin + k] < lowest ? 0.0 : (double)weights[begin + k];
    /* the group's sum was taken in another order: a rounding error must not lead past its last weight */
    const double rest = fmin(fmax(0.0, target - ends[group]), nextafter(inside, 0.0));
    int64_t place = 0;
    while (sums[place] <= rest) place++;
    return begin + place;
}

/* Tokens of the rows with these numbers, drawn from all that they hold, or from what top-p (`shares`, 1 for none) and
 * the `floors` of the scores leave of it. `scores` and `weights` are room for as many numbers as a row has, and `room`
 * for twice as many, rounded up to LANES; for `ends` see `invert`. */
void draw_from_rows(int64_t vocabulary, int64_t count, const float *logits, const int64_t *numbers, const float *peaks,
                    const float *temperatures, const double *shares, const float *floors, const double *u,
                    float *scores, float *weights, float *room, double *ends, int64_t *tokens) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = numbers[i];
        const double total =
            weigh_row(logits + row * vocabulary, vocabulary, peaks[row], temperatures[row], scores, weights);
        float lowest = floors[row];
        if (shares[row] < 1.0) {
            const float last = find_last_survivor(scores, weights, vocabulary, total, shares[row], room);
            lowest = last > lowest ? last : lowest;
        }
        tokens[row] = invert(scores, weights, vocabulary, lowest, u[row], ends);
    }
}
