// How many candidates a step verifies. Each kind of candidates has an estimate of the probability p that one is right,
// from what was verified of this sequence; k of them then give 1 + p + ... + p^k tokens on average. The step gets the
// numbers that give the most tokens for what it costs (step_cost), over all its sequences. No estimate is needed for a
// bound on what may be lost: the run has a balance, of steps of its sequences without candidates. Every step adds LOSS,
// accepted candidates what they gave, verified ones take what the step cost more; no step costs more than there is. So
// a text of N tokens in which no candidate is ever right takes at most FIRST + LOSS × N steps longer, if steps cost
// what the table says.
#include "speculate.h"

#include <string.h>

static const double FIRST = 0.5, LOSS = 0.03, MOST = 4, TRY = 1; // of the balance: at first, for each step, at most;
                                                                 // to try one against the estimate
static const double TRUST = 2;                                   // candidates that a prior counts as
static const double KEEP = 15.0 / 16, FORGET = 0.99; // of an estimate: for each new candidate; for a step without

// What a step of so many rows costs, in steps of one row; between two of these in proportion.
typedef struct {
    int rows;
    double cost;
} StepCost;

// LLaMA 3.1 8B's shape in bf16 on an H200, context length 128 (README): 3.58, 3.67, 3.98, 4.50, 4.83, 5.02, 5.35, 6.43
// and 9.87 ms. Rows of one sequence read its keys and values once: they cost less than this in long contexts.
static const StepCost gpu_costs[] = {{1, 1},     {2, 1.025}, {4, 1.11},   {8, 1.257}, {16, 1.35},
                                     {32, 1.40}, {64, 1.50}, {128, 1.80}, {256, 2.76}};
// LLaMA 3.2 1B's shape, AVX2, one thread, context length 64: 145, 189, 208, 253, 283, 364, 411 and 436 ms. More threads
// share the memory's speed and not the arithmetic's: they cost less than this.
static const StepCost cpu_costs[] = {{1, 1},   {2, 1.3},  {3, 1.44}, {4, 1.75}, {5, 1.95},
                                     {6, 2.5}, {7, 2.85}, {8, 3.0},  {256, 90}};

double speculation_step_cost(const Model *m, int n_rows) {
    const StepCost *c = strcmp(m->engine->name, "cpu") == 0 ? cpu_costs : gpu_costs;
    if (n_rows <= 1) return 1;
    while (c[1].rows < n_rows && c[1].rows < MAX_STEP_ROWS) c++;
    return c[0].cost + (c[1].cost - c[0].cost) * (n_rows - c[0].rows) / (c[1].rows - c[0].rows);
}

void speculation_init(Speculation *s, const Model *m, const Proposer *proposer) {
    *s = (Speculation){.proposer = *proposer, .model = m, .balance = FIRST};
}

bool speculation_prepare(Model *m, int n_slots, Error *err) {
    Error why = {""};
    if (!m->engine->step_rows)
        return fail(err,
                    "engine %s: its numbers depend on how many rows a step has, so that --lookup and --draft would "
                    "change the text",
                    m->engine->name);
    if (n_slots > MAX_SPECULATING)
        return fail(err,
                    "--lookup and --draft: %d sequences at a time, expected at most %d: a step has %d rows for each, "
                    "and at most %d",
                    n_slots, MAX_SPECULATING, MAX_CANDIDATES + 1, MAX_STEP_ROWS);
    int rows = m->engine->step_rows(m, n_slots, &why);
    if (rows == 0) return fail(err, "--lookup and --draft: %s", why.text);
    m->step_rows = rows;
    m->speculates = true;
    return true;
}

// ---- how many -------------------------------------------------------------------------------------------------------

static double probability(const Speculation *s, const Proposal *p, const Acceptance *a) {
    return (a->right[p->kind] + TRUST * s->proposer.prior[p->kind]) / (a->tried[p->kind] + TRUST);
}

// Lowers the numbers of candidates, n of each proposal, to those that give the most tokens for their cost. Where none
// does, but one would if it were right twice as often as estimated, that one is verified if the balance has TRY: an
// estimate may be wrong.
static void choose_numbers(const Speculation *s, Proposal *proposals, Acceptance *const *acceptance, int n_proposals,
                           int n_rows, int max_rows) {
    double gain[MAX_SLOTS], cost_each = s->proposer.cost ? s->proposer.cost(s->proposer.context) : 0;
    int order[MAX_STEP_ROWS] = {0}, taken[MAX_SLOTS] = {0}, n_taken = 0, best = 0, longest = 0;
    double base = speculation_step_cost(s->model, n_rows), tokens = n_rows, best_rate = n_rows / base;
    bool try_one = false;
    for (int i = 0; i < n_proposals; i++) gain[i] = probability(s, &proposals[i], acceptance[i]);
    while (n_rows + n_taken < max_rows) {
        int next = -1; // whose next candidate is the likeliest to be accepted
        for (int i = 0; i < n_proposals; i++)
            if (taken[i] < proposals[i].n && (next < 0 || gain[i] > gain[next])) next = i;
        if (next < 0) break;
        order[n_taken++] = next;
        longest = ++taken[next] > longest ? taken[next] : longest;
        double cost = speculation_step_cost(s->model, n_rows + n_taken) + cost_each * longest;
        tokens += gain[next];
        if (!s->always && cost / base - 1 > s->balance) break;
        if (n_taken == 1) try_one = s->balance >= TRY && (tokens + gain[next]) / cost > best_rate;
        if (s->always || tokens / cost > best_rate) best = n_taken, best_rate = tokens / cost;
        gain[next] *= probability(s, &proposals[next], acceptance[next]);
    }
    if (best == 0 && try_one) best = 1;
    for (int i = 0; i < n_proposals; i++) proposals[i].n = 0;
    for (int i = 0; i < best; i++) proposals[order[i]].n++;
}

bool speculation_propose(Speculation *s, Proposal *proposals, Acceptance *const *acceptance, int n_proposals,
                         int n_rows, int max_rows, Error *err) {
    for (int i = 0; i < n_proposals; i++) {
        Proposal *p = &proposals[i];
        if (p->most > MAX_CANDIDATES) p->most = MAX_CANDIDATES;
        if (p->most < 0) p->most = 0;
        p->kind = p->accepted = 0;
        p->n = p->most;
    }
    if (s->proposer.cost) {
        choose_numbers(s, proposals, acceptance, n_proposals, n_rows, max_rows);
        for (int i = 0; i < n_proposals; i++) proposals[i].most = proposals[i].n;
    }
    if (!s->proposer.propose(s->proposer.context, proposals, n_proposals, err)) return false;
    for (int i = 0; i < n_proposals; i++) { // likely ones that are not tried have their chance again
        if (proposals[i].n == 0 && !s->proposer.cost) continue;
        acceptance[i]->tried[proposals[i].kind] *= FORGET;
        acceptance[i]->right[proposals[i].kind] *= FORGET;
    }
    if (!s->proposer.cost) choose_numbers(s, proposals, acceptance, n_proposals, n_rows, max_rows);
    return true;
}

void speculation_learn(Speculation *s, const Proposal *proposals, Acceptance *const *acceptance, int n_proposals,
                       int n_rows) {
    double base = speculation_step_cost(s->model, n_rows);
    int verified = 0, accepted = 0, longest = 0;
    for (int i = 0; i < n_proposals; i++) {
        const Proposal *p = &proposals[i];
        double *tried = &acceptance[i]->tried[p->kind], *right = &acceptance[i]->right[p->kind];
        for (int j = 0; j < p->n && j <= p->accepted; j++) { // of those after one that was wrong nothing is known
            *tried = *tried * KEEP + 1;
            *right = *right * KEEP + (j < p->accepted);
        }
        verified += p->n;
        accepted += p->accepted;
        longest = p->n > longest ? p->n : longest;
    }
    double cost = speculation_step_cost(s->model, n_rows + verified);
    if (s->proposer.cost) cost += s->proposer.cost(s->proposer.context) * longest;
    s->balance += LOSS + (double)accepted / n_rows - (cost / base - 1);
    if (s->balance > MOST) s->balance = MOST;
}

void speculation_close(Speculation *s) {
    if (s->proposer.close) s->proposer.close(s->proposer.context);
    *s = (Speculation){.model = NULL};
}
