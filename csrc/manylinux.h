// For a wheel alone (OSTINATO_MANYLINUX, make wheel): the versions of functions that manylinux_2_28 has. Included ahead of
// threads.cpp, it binds to those of glibc 2.28 and of that libstdc++. Newer libraries keep these, for programs of that time.
//
// glibc 2.34 moved dlsym and the locks into libc.so under a new version; before, they were in libdl.so and libpthread.so,
// which Python itself loads. libstdc++ of GCC 12 took the noexcept from condition_variable::wait.
#pragma once

#if defined(__x86_64__)
#define OSTINATO_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define OSTINATO_GLIBC "GLIBC_2.17"
#endif
#define OSTINATO_BIND(name, version) __asm__(".symver " name ", " name "@" version)

OSTINATO_BIND("dlsym", OSTINATO_GLIBC);
OSTINATO_BIND("pthread_mutex_trylock", OSTINATO_GLIBC);
OSTINATO_BIND("_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE", "GLIBCXX_3.4.11");
