/* A PKCS#11 module of the tests: forwards every call to the module SHIM_MODULE, writes its name
 * to SHIM_LOG, and does instead what the file SHIM_CONTROL says. That file is an id, and a rule a
 * line: FUNCTION FIRST TIMES ACTION ARGUMENT. A rule applies to calls FIRST to FIRST + TIMES - 1 of
 * that function (all from FIRST where TIMES is 0), counted from when the id was first seen by this
 * process. Actions: "return CODE", "hang MILLISECONDS", "abort 0"; "absent 0" (with the function
 * "*"), under which the token is out of its slot and no session survives; "own-iv 0" (with
 * C_EncryptInit), under which AES-GCM refuses an IV and writes one of its own, as AWS CloudHSM; and
 * "flood KIB", which prints so much to standard output and error and into every pipe there is. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define FUNCTIONS 68
#define C_GET_FUNCTION_LIST 3
#define C_GET_SLOT_LIST 4
#define C_GET_TOKEN_INFO 6
#define C_OPEN_SESSION 12
#define C_CLOSE_ALL_SESSIONS 14
#define CKR_GENERAL_ERROR 0x05
#define CKR_DEVICE_REMOVED 0x32
#define CKR_TOKEN_NOT_PRESENT 0xE0
#define CKR_MECHANISM_PARAM_INVALID 0x71
#define CKM_AES_GCM 0x1087

typedef unsigned long U;
/* No function of the standard takes more than eight arguments, all of the size of a register. */
typedef U (*function)(U, U, U, U, U, U, U, U);
/* CK_FUNCTION_LIST of version 2.40. */
struct list {
    unsigned char major, minor;
    function call[FUNCTIONS];
};
struct rule {
    char name[40], action[16];
    U first, times, argument;
};

/* In the order of CK_FUNCTION_LIST. */
static const char *const names[FUNCTIONS] = {
    "C_Initialize", "C_Finalize", "C_GetInfo", "C_GetFunctionList", "C_GetSlotList",
    "C_GetSlotInfo", "C_GetTokenInfo", "C_GetMechanismList", "C_GetMechanismInfo", "C_InitToken",
    "C_InitPIN", "C_SetPIN", "C_OpenSession", "C_CloseSession", "C_CloseAllSessions",
    "C_GetSessionInfo", "C_GetOperationState", "C_SetOperationState", "C_Login", "C_Logout",
    "C_CreateObject", "C_CopyObject", "C_DestroyObject", "C_GetObjectSize", "C_GetAttributeValue",
    "C_SetAttributeValue", "C_FindObjectsInit", "C_FindObjects", "C_FindObjectsFinal",
    "C_EncryptInit", "C_Encrypt", "C_EncryptUpdate", "C_EncryptFinal", "C_DecryptInit",
    "C_Decrypt", "C_DecryptUpdate", "C_DecryptFinal", "C_DigestInit", "C_Digest",
    "C_DigestUpdate", "C_DigestKey", "C_DigestFinal", "C_SignInit", "C_Sign", "C_SignUpdate",
    "C_SignFinal", "C_SignRecoverInit", "C_SignRecover", "C_VerifyInit", "C_Verify",
    "C_VerifyUpdate", "C_VerifyFinal", "C_VerifyRecoverInit", "C_VerifyRecover",
    "C_DigestEncryptUpdate", "C_DecryptDigestUpdate", "C_SignEncryptUpdate",
    "C_DecryptVerifyUpdate", "C_GenerateKey", "C_GenerateKeyPair", "C_WrapKey", "C_UnwrapKey",
    "C_DeriveKey", "C_SeedRandom", "C_GenerateRandom", "C_GetFunctionStatus", "C_CancelFunction",
    "C_WaitForSlotEvent",
};

static struct list real, mine;
static char seen[40];
static U counts[FUNCTIONS];
static int was_absent;

static void note(const char *name) {
    const char *path = getenv("SHIM_LOG");
    char line[64];
    int fd, len = snprintf(line, sizeof line, "%s\n", name);
    if (!path || (fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600)) < 0) return;
    if (write(fd, line, len) != len) abort();
    close(fd);
}

/* What rule there is for this call; 1 if there is one. */
static int match(int at, struct rule *out) {
    const char *path = getenv("SHIM_CONTROL");
    FILE *file = path ? fopen(path, "re") : NULL;
    char id[40];
    int found = 0;
    if (!file) return 0;
    if (fscanf(file, "%39s", id) == 1) {
        struct rule rule;
        if (strcmp(id, seen)) {
            strcpy(seen, id);
            memset(counts, 0, sizeof counts);
        }
        counts[at]++;
        while (fscanf(file, "%39s %lu %lu %15s %li", rule.name, &rule.first, &rule.times,
                      rule.action, (long *)&rule.argument) == 5) {
            U n = counts[at];
            if (strcmp(rule.name, "*") && strcmp(rule.name, names[at])) continue;
            if (n < rule.first || (rule.times && n >= rule.first + rule.times)) continue;
            *out = rule;
            found = 1;
            break;
        }
    }
    fclose(file);
    return found;
}

/* CK_MECHANISM, and the beginning of CK_GCM_PARAMS. */
struct mechanism {
    U type;
    struct { unsigned char *iv; U iv_len; } *gcm;
};

/* Draws an IV, or returns CKR_MECHANISM_PARAM_INVALID where one was given. */
static U draw_iv(const struct mechanism *mechanism) {
    if (mechanism->type != CKM_AES_GCM) return 0;
    for (U i = 0; i < mechanism->gcm->iv_len; i++)
        if (mechanism->gcm->iv[i]) return CKR_MECHANISM_PARAM_INVALID;
    return getentropy(mechanism->gcm->iv, mechanism->gcm->iv_len) ? CKR_GENERAL_ERROR : 0;
}

static void close_everything(void) {
    U slots[64], n = 64;
    if (real.call[C_GET_SLOT_LIST](0, (U)slots, (U)&n, 0, 0, 0, 0, 0)) return;
    for (U i = 0; i < n; i++) real.call[C_CLOSE_ALL_SESSIONS](slots[i], 0, 0, 0, 0, 0, 0, 0);
}

static void flood(U kib) {
    static char junk[1024];
    struct stat is;
    memset(junk, 'x', sizeof junk);
    for (int fd = 1; fd < 64; fd++) {
        if (fd > 2 && (fstat(fd, &is) || !S_ISFIFO(is.st_mode))) continue;
        for (U i = 0; i < kib; i++)
            if (write(fd, junk, sizeof junk) <= 0) break;
    }
}

static U forward(int at, U a, U b, U c, U d, U e, U f, U g, U h) {
    struct rule rule;
    int hit = match(at, &rule), absent = hit && !strcmp(rule.action, "absent");
    note(names[at]);
    if (absent && !was_absent) close_everything();
    was_absent = absent;
    if (absent) {
        if (at == C_GET_SLOT_LIST && (a & 0xff)) {
            *(U *)c = 0;
            return 0;
        }
        if (at == C_GET_TOKEN_INFO || at == C_OPEN_SESSION) return CKR_TOKEN_NOT_PRESENT;
        if (at > C_OPEN_SESSION) return CKR_DEVICE_REMOVED;
    } else if (hit && !strcmp(rule.action, "return")) {
        return rule.argument;
    } else if (hit && !strcmp(rule.action, "own-iv")) {
        U refused = draw_iv((const struct mechanism *)b);
        if (refused) return refused;
    } else if (hit && !strcmp(rule.action, "abort")) {
        abort();
    } else if (hit && !strcmp(rule.action, "flood")) {
        flood(rule.argument);
    } else if (hit && !strcmp(rule.action, "hang")) {
        struct timespec time = {rule.argument / 1000, rule.argument % 1000 * 1000000};
        nanosleep(&time, NULL);
    }
    return real.call[at](a, b, c, d, e, f, g, h);
}

#define F(n)                                                       \
    static U f##n(U a, U b, U c, U d, U e, U f, U g, U h) {        \
        return forward(n, a, b, c, d, e, f, g, h);                 \
    }
#define TEN(x, t) x(t##0) x(t##1) x(t##2) x(t##3) x(t##4) x(t##5) x(t##6) x(t##7) x(t##8) x(t##9)
#define ALL(x)                                                                        \
    x(0) x(1) x(2) x(3) x(4) x(5) x(6) x(7) x(8) x(9) TEN(x, 1) TEN(x, 2) TEN(x, 3)   \
    TEN(x, 4) TEN(x, 5) x(60) x(61) x(62) x(63) x(64) x(65) x(66) x(67)
ALL(F)
#define NAME(n) f##n,
static const function forwarders[FUNCTIONS] = {ALL(NAME)};

U C_GetFunctionList(struct list **out) {
    const char *path = getenv("SHIM_MODULE");
    void *module = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
    U (*get)(struct list **) = NULL;
    struct list *list = NULL;
    if (!module) return CKR_GENERAL_ERROR;
    *(void **)&get = dlsym(module, "C_GetFunctionList");
    if (!get || get(&list)) return CKR_GENERAL_ERROR;
    real = mine = *list;
    for (int i = 0; i < FUNCTIONS; i++)
        if (real.call[i] && i != C_GET_FUNCTION_LIST) mine.call[i] = forwarders[i];
    *out = &mine;
    return 0;
}
