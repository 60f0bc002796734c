// Preloaded before libtsan's users: tells ThreadSanitizer what libgomp, which is not instrumented, makes happen in
// order. A team's threads start after the call that starts the team, and end before it returns.
#define _GNU_SOURCE
#include <dlfcn.h>

void __tsan_acquire(void* address);
void __tsan_release(void* address);

typedef void (*Body)(void*);
typedef void (*Parallel)(Body, void*, unsigned, unsigned);

struct Team {
  Body body;
  void* data;
  char start, end;
};

static void run(void* team_of) {
  struct Team* team = team_of;
  __tsan_acquire(&team->start);
  team->body(team->data);
  __tsan_release(&team->end);
}

void GOMP_parallel(Body body, void* data, unsigned threads, unsigned flags) {
  static Parallel original;
  if (!original) original = (Parallel)dlsym(RTLD_NEXT, "GOMP_parallel");
  struct Team team = {body, data, 0, 0};
  __tsan_release(&team.start);
  original(run, &team, threads, flags);
  __tsan_acquire(&team.end);
}
