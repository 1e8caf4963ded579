/* Putting functions of ours in place of the engine's helpers.
 *
 * Translated code calls helpers by address. The translator takes that address from a slot of the global offset table,
 * and looks it up in the engine's table of helpers. Both hold what the loader put there: every helper is an exported
 * symbol, and the image's own relocations say where its address stands. So no place is known beforehand here: the
 * relocations are read, and a place is changed only if the address in it is the one expected.
 *
 * The table is copied when an engine is opened, so all of this must happen before the first one is.
 */
#ifndef VMF_SLOTS_H
#define VMF_SLOTS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef void (*SlotFunction)(void);

typedef struct {
    const char *name;         /* without the engine's suffix for its target */
    SlotFunction replacement;
    SlotFunction *original;   /* where to put the engine's own function, or NULL */
    SlotFunction found;       /* filled in here */
    unsigned places;
} Slot;

#define SLOT_SUFFIX "_x86_64"

static inline int slot_order(const void *a, const void *b)
{
    uintptr_t left = (uintptr_t)((const Slot *)a)->found, right = (uintptr_t)((const Slot *)b)->found;
    return left < right ? -1 : left > right;
}

static inline Slot *slot_find(Slot *slots, size_t count, uintptr_t address)
{
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        uintptr_t found = (uintptr_t)slots[middle].found;
        if (found == address)
            return &slots[middle];
        if (found < address)
            low = middle + 1;
        else
            high = middle;
    }
    return NULL;
}

static inline bool slot_write(uintptr_t place, SlotFunction value)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = place & ~(page - 1);
    if (mprotect((void *)first, place + sizeof value - first, PROT_READ | PROT_WRITE))
        return false;
    memcpy((void *)place, &value, sizeof value);
    return true; /* the page stays writable: offset tables must be */
}

/* Go through the image's relocations for the slots' functions: count the places (`write` false), or change them. */
static inline bool slots_walk(const struct link_map *map, Slot *slots, size_t count, bool write)
{
    const Elf64_Rela *rows = NULL;
    const Elf64_Sym *symbols = NULL;
    size_t size = 0;
    for (const Elf64_Dyn *item = map->l_ld; item->d_tag != DT_NULL; item++) {
        if (item->d_tag == DT_RELA)
            rows = (const Elf64_Rela *)item->d_un.d_ptr;
        else if (item->d_tag == DT_RELASZ)
            size = item->d_un.d_val / sizeof *rows;
        else if (item->d_tag == DT_SYMTAB)
            symbols = (const Elf64_Sym *)item->d_un.d_ptr;
    }
    if (rows == NULL || symbols == NULL)
        return false;
    for (size_t n = 0; n < size; n++) {
        unsigned kind = (unsigned)ELF64_R_TYPE(rows[n].r_info);
        if ((kind != R_X86_64_64 && kind != R_X86_64_GLOB_DAT) || rows[n].r_addend)
            continue;
        Slot *slot = slot_find(slots, count, map->l_addr + symbols[ELF64_R_SYM(rows[n].r_info)].st_value);
        if (slot == NULL)
            continue;
        uintptr_t place = map->l_addr + rows[n].r_offset;
        if (!write && *(const uintptr_t *)place != (uintptr_t)slot->found)
            return false; /* another has been here, or this is not the image that was meant */
        if (write && !slot_write(place, slot->replacement))
            return false;
        slot->places += !write;
    }
    return true;
}

/* Replace all of `slots` (which are sorted on the way) in the image that `handle` is of. False, with nothing changed,
 * when one of them is not found in both of its places. */
static inline bool slots_replace(void *handle, Slot *slots, size_t count)
{
    struct link_map *map;
    if (dlinfo(handle, RTLD_DI_LINKMAP, &map))
        return false;
    for (size_t n = 0; n < count; n++) {
        char name[96] = "";
        if (strlen(slots[n].name) + sizeof SLOT_SUFFIX > sizeof name)
            return false;
        strcat(strcat(name, slots[n].name), SLOT_SUFFIX);
        slots[n].found = (SlotFunction)(uintptr_t)dlsym(handle, name);
        slots[n].places = 0;
        if (slots[n].found == NULL)
            return false;
    }
    qsort(slots, count, sizeof *slots, slot_order);
    if (!slots_walk(map, slots, count, false))
        return false;
    for (size_t n = 0; n < count; n++)
        if (slots[n].places != 2)
            return false;
    for (size_t n = 0; n < count; n++)
        if (slots[n].original != NULL)
            *slots[n].original = slots[n].found;
    return slots_walk(map, slots, count, true);
}

#endif
