"""The transportation problem of one window after the other, solved exactly by successive shortest paths.

With uniform marginals it is a problem in integers: with g = gcd(S, T), each student token supplies T/g units and each
teacher token takes S/g. Every search sends at least one unit, so the end comes whatever the costs: ties, rounding and
equal tokens cost time only. Flows are whole numbers (kept as float64, so that all arrays of a loop are equally wide),
hence marginals are exact; costs that are multiples of 2**-24, as `ground_cost` gives them, are added exactly, too.

Why not a library: `python -m bench.transport` measures this against loops over POT's `emd2` and over SciPy's assignment
solver (S == T only). It is faster than both, on small windows above all, and other threads run meanwhile.

One side of the problem is called rows and the other columns: [row, column] may be [student, teacher] or the reverse.
"""

import math
from contextlib import suppress

import numpy as np
from numba import njit

INF = math.inf
# Lets the compiler take minima in any order; infinities keep their meaning, and NaN does not get here.
FAST = {"nnan", "nsz"}
# Small functions are inlined by hand: called for real, their dozen arrays would cost as much as what they do.


@njit(nogil=True, fastmath=FAST)
def solve(cost_MST, rows_M, columns_M, plan_MST, distance_M):
    """Writes plans and distances of all windows. `plan_MST` comes in as zeros; entries past the lengths stay so."""
    size = max(cost_MST.shape[1], cost_MST.shape[2])
    cost, cost_t = np.empty((size, size)), np.empty((size, size))
    flow, flow_t = np.empty((size, size)), np.empty((size, size))
    supply, demand, u, v, row_arcs, column_arcs = [np.empty(size) for _ in range(6)]
    distance, reached_at, joined_at = np.empty(size), np.empty(size), np.empty(size)
    parent, entry, tree = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    for m in range(cost_MST.shape[0]):
        num_student, num_teacher = rows_M[m], columns_M[m]
        swapped = num_student > num_teacher  # the greedy start does better from the side of fewer, larger supplies
        num_rows, num_columns = min(num_student, num_teacher), max(num_student, num_teacher)
        straight, turned = (cost_t, cost) if swapped else (cost, cost_t)
        for i in range(num_student):
            for j in range(num_teacher):
                straight[i, j] = cost_MST[m, i, j]
                turned[j, i] = cost_MST[m, i, j]
        units = math.gcd(num_student, num_teacher)
        supply[:num_rows], demand[:num_columns] = num_columns // units, num_rows // units
        start(cost, flow, flow_t, supply, demand, u, v, row_arcs, column_arcs, num_rows, num_columns)
        open_rows, open_columns, i, j = 0, 0, 0, 0
        for k in range(num_rows):
            open_rows += supply[k] > 0.0
        for k in range(num_columns):
            open_columns += demand[k] > 0.0
        while open_rows > 0:
            if open_rows <= open_columns:  # a search ends the sooner the more there are of what it looks for
                while supply[i] == 0.0:
                    i += 1
                open_columns -= send(
                    i, cost, flow, flow_t, supply, demand, u, v, row_arcs, column_arcs, num_rows, num_columns,
                    distance, reached_at, joined_at, parent, entry, tree,
                )  # fmt: skip
                open_rows -= supply[i] == 0.0
            else:
                while demand[j] == 0.0:
                    j += 1
                open_rows -= send(
                    j, cost_t, flow_t, flow, demand, supply, v, u, column_arcs, row_arcs, num_columns, num_rows,
                    distance, reached_at, joined_at, parent, entry, tree,
                )  # fmt: skip
                open_columns -= demand[j] == 0.0
        total = num_rows * (num_columns // units)
        spent = 0.0
        sent = flow_t if swapped else flow
        for i in range(num_student):
            for j in range(num_teacher):
                if sent[i, j] > 0.0:
                    plan_MST[m, i, j] = sent[i, j] / total
                    spent += sent[i, j] * cost_MST[m, i, j]
        distance_M[m] = spent / total


@njit(nogil=True, fastmath=FAST)
def start(cost, flow, flow_t, supply, demand, u, v, row_arcs, column_arcs, num_rows, num_columns):
    """Potentials that leave no reduced cost cost - u - v below 0, and what can be sent where it is 0."""
    for j in range(num_columns):
        v[j], column_arcs[j] = INF, 0.0
        for i in range(num_rows):
            flow_t[j, i] = 0.0
    for i in range(num_rows):
        row_arcs[i] = 0.0
        for j in range(num_columns):
            flow[i, j] = 0.0
            v[j] = min(v[j], cost[i, j])
    for i in range(num_rows):
        lowest = INF
        for j in range(num_columns):
            lowest = min(lowest, cost[i, j] - v[j])
        u[i] = lowest
        for j in range(num_columns):
            if cost[i, j] - v[j] == lowest and demand[j] > 0.0 and supply[i] > 0.0:
                amount = min(supply[i], demand[j])
                flow[i, j] = flow_t[j, i] = amount
                supply[i] -= amount
                demand[j] -= amount
                row_arcs[i] += 1.0
                column_arcs[j] += 1.0


@njit(nogil=True, fastmath=FAST)
def send(
    source, cost, flow, flow_t, supply, demand, u, v, row_arcs, column_arcs, num_rows, num_columns,
    distance, reached_at, joined_at, parent, entry, tree,
):  # fmt: skip
    """Dijkstra's search from a row with supply left, along reduced costs, forwards over all arcs, back over used ones.

    Sends to each column with demand left that it comes to, nearest first, until the supply is gone or a used arc runs
    empty, which cuts the tree of shortest paths. Then moves the potentials, so that all arcs of the tree have reduced
    cost 0. Gives the number of columns filled. A column that is done has distance -INF.
    """
    for j in range(num_columns):
        distance[j] = INF
    for i in range(num_rows):
        joined_at[i] = INF
    tree[0], joined_at[source], entry[source] = source, 0.0, -1
    in_tree, scanned, filled, now = 1, 0, 0, 0.0
    while True:
        for k in range(scanned, in_tree):
            i = tree[k]
            scan(i, joined_at[i], cost, u, v, flow, column_arcs, demand, distance, parent, reached_at, num_columns)
        scanned = in_tree
        now, column = nearest(distance, demand, num_columns)
        if demand[column] > 0.0:
            cut = push(source, column, flow, flow_t, supply, demand, row_arcs, column_arcs, parent, entry)
            filled += demand[column] == 0.0
            if cut or supply[source] == 0.0:
                break
        distance[column], reached_at[column] = -INF, now
        unseen = column_arcs[column]
        for i in range(num_rows):
            if flow_t[column, i] > 0.0:
                if joined_at[i] == INF:
                    joined_at[i], entry[i], tree[in_tree] = now, column, i
                    in_tree += 1
                unseen -= 1.0
                if unseen == 0.0:
                    break
    for k in range(in_tree):
        u[tree[k]] += now - joined_at[tree[k]]
    for j in range(num_columns):
        v[j] -= now - reached_at[j] if distance[j] == -INF else 0.0
    return filled


@njit(nogil=True, fastmath=FAST, inline="always")
def scan(i, joined_at, cost, u, v, flow, column_arcs, demand, distance, parent, reached_at, num_columns):
    """Nearer ways to columns over row i. A full column that only i serves leads nowhere else: it is done at once."""
    base = joined_at - u[i]
    for j in range(num_columns):  # no branches: the compiler makes vector instructions of it
        way, found = base + (cost[i, j] - v[j]), distance[j]
        own = (flow[i, j] > 0.0) & (column_arcs[j] == 1.0) & (demand[j] == 0.0) & (found > -INF)
        nearer = way < found
        parent[j] = i if nearer else parent[j]
        found = way if nearer else found
        distance[j] = -INF if own else found
        reached_at[j] = joined_at if own else reached_at[j]


@njit(nogil=True, fastmath=FAST, inline="always")
def nearest(distance, demand, num_columns):
    """The smallest distance and its column; of equally near ones the first with demand left, else the first."""
    lowest = INF
    for j in range(num_columns):
        found = distance[j]
        lowest = min(lowest, INF if found == -INF else found)
    best = 2 * num_columns
    for j in range(num_columns):
        rank = j if demand[j] > 0.0 else j + num_columns
        best = min(best, rank if distance[j] == lowest else 2 * num_columns)
    return lowest, best % num_columns


@njit(nogil=True, fastmath=FAST, inline="always")
def push(source, column, flow, flow_t, supply, demand, row_arcs, column_arcs, parent, entry):
    """Sends what the path to `column` can carry; true if that empties an arc."""
    amount = min(supply[source], demand[column])
    i, j = parent[column], column
    while i != source:
        j = entry[i]
        amount = min(amount, flow[i, j])
        i = parent[j]
    cut, j = False, column
    while True:
        i = parent[j]
        if flow[i, j] == 0.0:
            row_arcs[i] += 1.0
            column_arcs[j] += 1.0
        flow[i, j] += amount
        flow_t[j, i] += amount
        if i == source:
            break
        j = entry[i]
        flow[i, j] -= amount
        flow_t[j, i] -= amount
        if flow[i, j] == 0.0:
            row_arcs[i] -= 1.0
            column_arcs[j] -= 1.0
            cut = True
    supply[source] -= amount
    demand[column] -= amount
    return cut


for _function in (start, send, solve):
    with suppress(RuntimeError):  # no folder that numba may write to: each process compiles for itself
        _function.enable_caching()
