# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""How many pixels every pair of ids of two label maps shares, in one pass over both maps.

Neighbours mostly hold the same pair of ids. So a vectorised loop marks where a pair differs from the one before it, and
only there, at the end of a run, a small hash table is touched. Nothing is allocated but that table, which grows with
the number of pairs. Upper limit: the speed at which memory gives the two maps.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

import numpy

cdef enum:
    BLOCK = 2048  # pixels whose marks lie in the cache together
    WORD = 8  # marks looked at together
    FIRST_BITS = 10


cdef struct Table:
    # Open addressing with linear probing: 2^bits slots, about half of them taken at most; one with count 0 is free.
    uint64_t *keys
    int64_t *counts
    int bits
    size_t taken


cdef bint make(Table *table, int bits) noexcept nogil:
    """An empty table of 2^bits slots; whether there was memory."""
    table.keys = <uint64_t *> calloc(<size_t> 1 << bits, sizeof(uint64_t))
    table.counts = <int64_t *> calloc(<size_t> 1 << bits, sizeof(int64_t))
    table.bits = bits
    table.taken = 0
    return table.keys != NULL and table.counts != NULL


cdef void release(Table *table) noexcept nogil:
    free(table.keys)
    free(table.counts)


cdef inline size_t slot_of(const Table *table, uint64_t key) noexcept nogil:
    """The slot that holds the key or is free for it. The factor is 2^64 over the golden ratio (Knuth, TAOCP 6.4)."""
    cdef size_t slot = <size_t> ((key * <uint64_t> 0x9E3779B97F4A7C15ULL) >> (64 - table.bits))
    while table.counts[slot] != 0 and table.keys[slot] != key:
        slot = (slot + 1) & ((<size_t> 1 << table.bits) - 1)
    return slot


cdef bint double_size(Table *table) noexcept nogil:
    """Whether there was memory; if not, the table stays as it was."""
    cdef Table wider
    cdef size_t i, slot
    if not make(&wider, table.bits + 1):
        release(&wider)
        return False
    for i in range(<size_t> 1 << table.bits):
        if table.counts[i] != 0:
            slot = slot_of(&wider, table.keys[i])
            wider.keys[slot] = table.keys[i]
            wider.counts[slot] = table.counts[i]
    wider.taken = table.taken
    release(table)
    table[0] = wider
    return True


cdef inline bint add(Table *table, int32_t a, int32_t b, size_t count) noexcept nogil:
    """Adds pixels to the pair (a, b); whether there was memory."""
    cdef uint64_t key = (<uint64_t> <uint32_t> a) << 32 | <uint32_t> b
    cdef size_t slot = slot_of(table, key)
    if table.counts[slot] == 0:
        if 2 * table.taken >= <size_t> 1 << table.bits:
            if not double_size(table):
                return False
            slot = slot_of(table, key)
        table.keys[slot] = key
        table.taken += 1
    table.counts[slot] += <int64_t> count
    return True


cdef inline void mark_changes(
    uint8_t *changes, const int32_t *first, const int32_t *second, size_t size
) noexcept nogil:
    """1 where a pixel holds another pair than the one before it. Compilers vectorise this loop."""
    cdef size_t i
    for i in range(size):
        changes[i] = (first[i] != first[i - 1]) | (second[i] != second[i - 1])


cdef inline size_t find_changes(uint32_t *found, const uint8_t *changes, size_t size) noexcept nogil:
    """The positions of the marks and their number. Words without a mark are skipped; within one nothing branches."""
    cdef size_t count = 0, i = 0, k
    cdef uint64_t word
    while i < size:
        memcpy(&word, changes + i, WORD)
        if word != 0:
            for k in range(i, i + WORD):
                found[count] = <uint32_t> k
                count += changes[k]
        i += WORD
    return count


cdef bint count_runs(Table *table, const int32_t *first, const int32_t *second, size_t size) noexcept nogil:
    """Counts two maps of `size` ≥ 1 pixels; whether there was memory."""
    cdef uint8_t changes[BLOCK + WORD]
    cdef uint32_t found[BLOCK + WORD]
    cdef size_t start = 0, block = 1, length, end, i
    while block < size:
        length = min(<size_t> BLOCK, size - block)
        mark_changes(changes, first + block, second + block, length)
        memset(changes + length, 0, WORD)  # the last word may reach beyond the block
        for i in range(find_changes(found, changes, length)):
            end = block + found[i]
            if not add(table, first[start], second[start], end - start):
                return False
            start = end
        block += length
    return add(table, first[start], second[start], size - start)


def count_pairs(const int32_t[::1] first, const int32_t[::1] second):
    """The pairs of ids of two flat maps of one size and the pixels of each pair, in no promised order.

    Returns:
        N uint64 keys, the first id in the upper 32 bits, the second in the lower; N int64 counts.
    """
    cdef Table table
    cdef size_t i, row = 0, size = first.shape[0]
    cdef bint done
    cdef uint64_t[::1] key_of
    cdef int64_t[::1] count_of
    if first.shape[0] != second.shape[0]:
        raise ValueError(f"the maps have {first.shape[0]} and {second.shape[0]} pixels: they must have one size")
    done = make(&table, FIRST_BITS)
    try:
        if done and size:
            with nogil:
                done = count_runs(&table, &first[0], &second[0], size)
        if not done:
            raise MemoryError("no memory for the table of overlaps")
        keys, counts = numpy.empty(table.taken, numpy.uint64), numpy.empty(table.taken, numpy.int64)
        key_of, count_of = keys, counts
        for i in range(<size_t> 1 << table.bits):
            if table.counts[i] != 0:
                key_of[row] = table.keys[i]
                count_of[row] = table.counts[i]
                row += 1
        return keys, counts
    finally:
        release(&table)
