# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""How many pixels every pair of ids of two label maps shares, in one pass over both maps.

Neighbours mostly hold the same pair of ids. So a vectorised loop marks where a pair differs from the one before it, and
only there, at the end of a run, a small hash table is touched. Nothing is allocated but that table, which grows with
the number of pairs. Upper limit: the speed at which memory gives the two maps.
"""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, qsort
from libc.string cimport memcpy, memset

cdef enum:
    BLOCK = 2048  # pixels whose marks lie in the cache together
    WORD = 8  # marks looked at together
    FIRST_BITS = 10


cdef struct Slot:
    uint64_t key  # see key_of
    int64_t count  # 0: the slot is free


cdef struct Table:
    # Open addressing with linear probing: 2^bits slots, about half of them taken at most.
    Slot *slots
    int bits
    size_t taken


cdef bint make(Table *table, int bits) noexcept nogil:
    """An empty table of 2^bits slots; whether there was memory."""
    table.slots = <Slot *> calloc(<size_t> 1 << bits, sizeof(Slot))
    table.bits = bits
    table.taken = 0
    return table.slots != NULL


cdef inline uint64_t key_of(int32_t a, int32_t b) noexcept nogil:
    """Ascends as the pair does: first by a, then by b; the smallest int32 becomes 0."""
    return <uint64_t> (<uint32_t> a ^ <uint32_t> 0x80000000) << 32 | (<uint32_t> b ^ <uint32_t> 0x80000000)


cdef inline int32_t id_of(uint64_t half) noexcept nogil:
    return <int32_t> (<uint32_t> half ^ <uint32_t> 0x80000000)


cdef inline Slot *slot_of(const Table *table, uint64_t key) noexcept nogil:
    """The slot that holds the key or is free for it. The factor is 2^64 over the golden ratio (Knuth, TAOCP 6.4)."""
    cdef size_t i = <size_t> ((key * <uint64_t> 0x9E3779B97F4A7C15ULL) >> (64 - table.bits))
    while table.slots[i].count != 0 and table.slots[i].key != key:
        i = (i + 1) & ((<size_t> 1 << table.bits) - 1)
    return &table.slots[i]


cdef bint double_size(Table *table) noexcept nogil:
    """Whether there was memory; if not, the table stays as it was."""
    cdef Table wider
    cdef size_t i
    if not make(&wider, table.bits + 1):
        return False
    for i in range(<size_t> 1 << table.bits):
        if table.slots[i].count != 0:
            slot_of(&wider, table.slots[i].key)[0] = table.slots[i]
    wider.taken = table.taken
    free(table.slots)
    table[0] = wider
    return True


cdef inline bint add(Table *table, int32_t a, int32_t b, size_t count) noexcept nogil:
    """Adds pixels to the pair (a, b); whether there was memory."""
    cdef uint64_t key = key_of(a, b)
    cdef Slot *slot = slot_of(table, key)
    if slot.count == 0:
        if 2 * table.taken >= <size_t> 1 << table.bits:
            if not double_size(table):
                return False
            slot = slot_of(table, key)
        slot.key = key
        table.taken += 1
    slot.count += <int64_t> count
    return True


cdef extern from *:
    """
    #if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
    #define WIDEST_VECTORS __attribute__((target_clones("avx2", "default")))
    #else
    #define WIDEST_VECTORS
    #endif

    WIDEST_VECTORS static void mark_changes(
        uint8_t *changes, const int32_t *first, const int32_t *second, ptrdiff_t size
    ) {
        for (ptrdiff_t i = 0; i < size; i++)
            changes[i] = ((first[i] ^ first[i - 1]) | (second[i] ^ second[i - 1])) != 0;
    }
    """
    # 1 where a pixel holds another pair than the one before it. In C for the attribute alone: the compiler vectorises
    # the loop twice, and the loader takes the version that the processor can run.
    void mark_changes(uint8_t *changes, const int32_t *first, const int32_t *second, ptrdiff_t size) noexcept nogil


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
        mark_changes(changes, first + block, second + block, <ptrdiff_t> length)
        memset(changes + length, 0, WORD)  # the last word may reach beyond the block
        for i in range(find_changes(found, changes, length)):
            end = block + found[i]
            if not add(table, first[start], second[start], end - start):
                return False
            start = end
        block += length
    return add(table, first[start], second[start], size - start)


cdef int compare(const void *one, const void *other) noexcept nogil:
    cdef uint64_t a = (<const Slot *> one).key, b = (<const Slot *> other).key
    return (a > b) - (a < b)


cdef void sort(Table *table) noexcept nogil:
    """Brings what is taken to the front, ascending; a table no more, but a list."""
    cdef size_t i, count = 0
    for i in range(<size_t> 1 << table.bits):
        if table.slots[i].count != 0:
            table.slots[count] = table.slots[i]
            count += 1
    qsort(table.slots, count, sizeof(Slot), compare)


def count_overlaps(const int32_t[::1] first, const int32_t[::1] second):
    """Pixels of every pair and of every id of two flat maps of one size.

    Returns:
        {(id of first, id of second): pixels}, ascending; {id of first: pixels}; {id of second: pixels}.
    """
    cdef Table table
    cdef size_t i, size = first.shape[0]
    cdef bint done
    cdef dict pairs = {}, of_first = {}, of_second = {}
    if first.shape[0] != second.shape[0]:
        raise ValueError(f"the maps have {first.shape[0]} and {second.shape[0]} pixels: they must have one size")
    done = make(&table, FIRST_BITS)
    try:
        if done and size:
            with nogil:
                done = count_runs(&table, &first[0], &second[0], size)
                if done:
                    sort(&table)
        if not done:
            raise MemoryError("no memory for the table of overlaps")
        for i in range(table.taken):
            a, b, count = id_of(table.slots[i].key >> 32), id_of(table.slots[i].key), table.slots[i].count
            pairs[a, b] = count
            of_first[a] = of_first.get(a, 0) + count
            of_second[b] = of_second.get(b, 0) + count
        return pairs, of_first, of_second
    finally:
        free(table.slots)
