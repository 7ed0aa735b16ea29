# Compiles for Linux on aarch64 with Debian's cross compiler, against the Python and the C library that tools/arm/run.py
# unpacks into OSTINATO_SYSROOT.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)

# CMake reads this file again for its own trials, which only know what is named here.
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES OSTINATO_SYSROOT)
set(CMAKE_SYSROOT ${OSTINATO_SYSROOT})
