// What this binary is. version.c is compiled anew when the commit changes.
#ifndef VERSION_H
#define VERSION_H

extern const char version_number[]; // what the file VERSION says: 0.2
extern const char version_commit[]; // of the sources, "+" after it if they were edited; "unknown" outside of git
extern const char version_cuda[];   // CUDA's release and the architectures built, or "no CUDA"

#endif
