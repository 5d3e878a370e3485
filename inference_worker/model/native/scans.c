/* Passes over rows of logits, for drawing from them: see scans.py. A row is read from memory once, and is in the
 * processor's cache from then on. What comes of a row follows from that row alone. */
#include <float.h>

#include "numbers.h"

#define GROUPS 512   /* of a row's logits, logit i in group i modulo their number */
#define SUMMED 256   /* weights that are added up as floats, before doubles take over */
#define SLACK 1e-5   /* how far below a floor candidates begin, relative to the logits: their scores are rounded */
#define LOWEST -87.0f /* `exponential` goes no lower */


INLINE vector get_until(const float *logits, int64_t i, int64_t end) {
    return i + LANES <= end ? get(logits + i) : get_some(logits + i, end - i);
}

/* The weights of the logits from i on: e to the (logit - peak) / temperature, 0 where that is below e^LOWEST. */
INLINE vector weights_from(const float *logits, int64_t i, int64_t end, float peak, float temperature) {
    vector score = get_until(logits, i, end) - peak;
    if (temperature != 1.0f) score /= temperature;
    return pick(score < all(LOWEST), all(0.0f), exponential(score));
}

INLINE float weigh(const float *logits, int64_t begin, int64_t end, float peak, float temperature) {
    vector total = all(0.0f);
    for (int64_t i = begin; i < end; i += LANES) total += weights_from(logits, i, end, peak, temperature);
    return sum(total);
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

/* The ids of the logits that are `bound` or more, ascending, and these logits; how many there are, of which `most` are
 * kept. */
static int64_t find_from(const float *logits, int64_t vocabulary, float bound, int64_t most, int64_t *ids,
                         float *values) {
    int64_t count = 0;
    for (int64_t i = 0; i < vocabulary; i += LANES)
        for (uint32_t bits = lanes_from(get_until(logits, i, vocabulary), bound); bits; bits &= bits - 1, count++) {
            if (count >= most) continue;
            ids[count] = i + __builtin_ctz(bits);
            values[count] = logits[ids[count]];
        }
    return count;
}

/* Of each row of `logits` [rows, vocabulary] its peak and, unless `firsts` is negative or the peak is not finite, its
 * candidates. They are the logits from a bound on, which is the greater of two: the first-th greatest of the groups'
 * peaks, if that is not 0, and the floor, which lies `depths` below the peak. `ids` and `values` [rows, most] take
 * them, and minus infinities behind them up to the width that they have together, which is the result; `counts` says
 * how many there were, and `is_floor` whether the floor was the bound. `masses` is the sum of all weights of the rows
 * that need it. What a row has none of is 0. */
int64_t survey(int64_t rows, int64_t vocabulary, int64_t most, const float *logits, const int64_t *firsts,
               const double *depths, const float *temperatures, const uint8_t *needs_mass, float *peaks, int64_t *ids,
               float *values, int64_t *counts, double *masses, uint8_t *is_floor) {
    int64_t width = 0;
    for (int64_t row = 0; row < rows; row++, logits += vocabulary) {
        float groups[GROUPS];
        const float peak = peaks[row] = find_peaks(logits, vocabulary, groups);
        counts[row] = 0, masses[row] = 0.0, is_floor[row] = 0;
        if (firsts[row] < 0 || !isfinite(peak)) continue;
        const double floor = peak - depths[row] - SLACK * (fabs((double)peak) + depths[row]);
        float bound = firsts[row] > 0 ? find_kth(groups, firsts[row]) : -INFINITY;
        is_floor[row] = isfinite(depths[row]) && floor >= bound;
        if (is_floor[row]) bound = (float)floor;
        if (bound == -INFINITY) bound = -FLT_MAX; /* a forbidden token is no candidate */
        counts[row] = find_from(logits, vocabulary, bound, most, ids + row * most, values + row * most);
        width = counts[row] > width ? least(counts[row], most) : width;
        if (!needs_mass[row]) continue;
        for (int64_t i = 0; i < vocabulary; i += SUMMED)
            masses[row] += (double)weigh(logits, i, least(i + SUMMED, vocabulary), peak, temperatures[row]);
    }
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = counts[row]; i < width; i++) ids[row * most + i] = 0, values[row * most + i] = -INFINITY;
    return width;
}

/* Tokens of the rows with these numbers, drawn from all that they hold: the inverse of the cumulative distribution at
 * `u`, in the order of token ids. `ends` is room for a number for every SUMMED tokens, and one more. */
void draw_untruncated(int64_t vocabulary, int64_t count, const float *logits, const int64_t *numbers,
                      const float *peaks, const float *temperatures, const double *u, double *ends, int64_t *tokens) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = numbers[i];
        const float *x = logits + row * vocabulary, peak = peaks[row], temperature = temperatures[row];
        int64_t group = 0;
        ends[0] = 0.0;
        for (int64_t g = 0; g * SUMMED < vocabulary; g++)
            ends[g + 1] = ends[g] + (double)weigh(x, g * SUMMED, least((g + 1) * SUMMED, vocabulary), peak, temperature);
        const double total = ends[divide_up(vocabulary, SUMMED)];
        const double target = fmin(u[row] * total, nextafter(total, 0.0));
        while (ends[group + 1] <= target) group++;
        double sums[SUMMED], inside = 0.0;
        const int64_t begin = group * SUMMED, end = least(begin + SUMMED, vocabulary);
        for (int64_t k = begin; k < end; k += LANES) {
            vector weights = weights_from(x, k, end, peak, temperature);
            for (int j = 0; j < LANES; j++) sums[k - begin + j] = inside += (double)weights[j];
        }
        /* the group's sum was taken in another order: a rounding error must not lead past its last weight */
        const double rest = fmin(fmax(0.0, target - ends[group]), nextafter(inside, 0.0));
        int64_t place = 0;
        while (sums[place] <= rest) place++;
        tokens[row] = begin + place;
    }
}
