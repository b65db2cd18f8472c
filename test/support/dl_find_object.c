// Debian's libgcc_eh finds the frames of a function by glibc's _dl_find_object; here it is for musl.
#define _GNU_SOURCE
#include <link.h>

struct dl_find_object {
  unsigned long long flags;
  void *start, *end;
  struct link_map *map;
  void *frames;
  unsigned long long reserved[7];
};

struct search {
  ElfW(Addr) address;
  struct dl_find_object *found;
};

static int look(struct dl_phdr_info *info, size_t size, void *argument) {
  struct search *search = argument;
  void *start = 0, *end = 0, *frames = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr) *part = &info->dlpi_phdr[i];
    ElfW(Addr) first = info->dlpi_addr + part->p_vaddr;
    if (part->p_type == PT_GNU_EH_FRAME) frames = (void *)first;
    if (part->p_type == PT_LOAD && search->address >= first && search->address < first + part->p_memsz) {
      start = (void *)first;
      end = (void *)(first + part->p_memsz);
    }
  }
  if (!start || !frames) return 0;
  *search->found = (struct dl_find_object){.start = start, .end = end, .frames = frames};
  return 1;
}

int _dl_find_object(void *address, struct dl_find_object *found) {
  struct search search = {(ElfW(Addr))address, found};
  return dl_iterate_phdr(look, &search) ? 0 : -1;
}
