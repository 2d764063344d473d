/* A tiny libnvidia-ml.so.1: two GPUs at the ABI that the collector uses. What it does not export, the driver of an
 * older machine would not export either. The file named by FAKE_NVML says how it behaves now:
 * (one process, ours, runs on GPU 0; only the older call for it is there)
 *   "ok"  "lost" (GPU 1 has fallen off the bus)  "hang" (calls on GPU 1 do not return)  "hang-all" */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SUCCESS 0
#define NOT_SUPPORTED 3
#define INSUFFICIENT_SIZE 7
#define GPU_IS_LOST 15

typedef struct { unsigned int gpu, memory; } utilization_t;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } memory_v2_t;

static int gpus[2] = {0, 1};
static unsigned long long energy[2] = {1000000, 5000000};

static int says(const char *word) {
  char text[32] = "ok";
  const char *path = getenv("FAKE_NVML");
  FILE *file = path ? fopen(path, "r") : NULL;
  if (file) { if (fscanf(file, "%31s", text) != 1) text[0] = 0; fclose(file); }
  return strcmp(text, word) == 0;
}

static int check(int *device) {
  while (says("hang-all") || (*device == 1 && says("hang"))) usleep(50000);
  return *device == 1 && says("lost") ? GPU_IS_LOST : SUCCESS;
}

int nvmlInitWithFlags(unsigned int flags) { (void)flags; return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == GPU_IS_LOST ? "GPU is lost" : "not supported"; }
int nvmlSystemGetDriverVersion(char *text, unsigned int size) { snprintf(text, size, "580.65.06"); return SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int n, int **device) { *device = &gpus[n]; return SUCCESS; }
int nvmlDeviceGetUUID(int *device, char *text, unsigned int size) {
  snprintf(text, size, "GPU-00000000-0000-0000-0000-00000000000%d", *device);
  return SUCCESS;
}
int nvmlDeviceGetName(int *device, char *text, unsigned int size) {
  (void)device; snprintf(text, size, "NVIDIA Fake 80GB"); return SUCCESS;
}
int nvmlDeviceGetUtilizationRates(int *device, utilization_t *rates) {
  int code = check(device);
  rates->gpu = 40 + *device; rates->memory = 7;
  return code;
}
int nvmlDeviceGetMemoryInfo_v2(int *device, memory_v2_t *memory) {
  memory->total = 80ull << 30; memory->reserved = 512ull << 20; memory->used = 3ull << 30;
  (void)device; return SUCCESS;
}
int nvmlDeviceGetTotalEnergyConsumption(int *device, unsigned long long *mj) {
  *mj = energy[*device] += 250000;
  return SUCCESS;
}
int nvmlDeviceGetPowerUsage(int *device, unsigned int *mw) { *mw = 250000 + *device; return SUCCESS; }
int nvmlDeviceGetFanSpeed(int *device, unsigned int *percent) { (void)device; (void)percent; return NOT_SUPPORTED; }

typedef struct { unsigned int pid; unsigned long long memory; unsigned int instance, compute_instance; } process_t;
int nvmlDeviceGetComputeRunningProcesses_v2(int *device, unsigned int *count, process_t *processes) {
  int code = check(device);
  unsigned int room = *count;
  if (code != SUCCESS) return code;
  *count = *device == 0 ? 1 : 0;
  if (*count > room) return INSUFFICIENT_SIZE;
  if (*count) processes[0] = (process_t){.pid = getpid(), .memory = 1ull << 30, .instance = -1, .compute_instance = -1};
  return SUCCESS;
}
