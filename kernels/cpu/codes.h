// Codes shared by a kernel and its caller: for choices that the caller makes by name, and for the status.

#pragma once

#include <cstdint>
#include <cstring>
#include <new>

namespace fastsde {

struct UnknownCode {};

// FASTSDE_ENUM defines an enum whose members the caller looks up by name. LIST(X) is X(MEMBER, "name") for each member;
// then code_of<Kind>("name") is its code, or -1, and known<Kind>(code) is the member, or throws UnknownCode.
template <class Kind>
int32_t code_of(const char* name);
template <class Kind>
Kind known(int32_t code);

#define FASTSDE_MEMBER(member, name) member,
#define FASTSDE_RETURN_NAMED(member, name)              \
    if (std::strcmp(asked, name) == 0) return member;
#define FASTSDE_RETURN_KNOWN(member, name)              \
    if (code == member) return member;
#define FASTSDE_ENUM(Kind, LIST)                        \
    enum Kind : int32_t { LIST(FASTSDE_MEMBER) };       \
    template <>                                         \
    inline int32_t code_of<Kind>(const char* asked) {   \
        LIST(FASTSDE_RETURN_NAMED)                      \
        return -1;                                      \
    }                                                   \
    template <>                                         \
    inline Kind known<Kind>(int32_t code) {             \
        LIST(FASTSDE_RETURN_KNOWN)                      \
        throw UnknownCode();                            \
    }

// What a kernel returns.
enum Status : int { DONE = 0, OUT_OF_MEMORY = 1, UNKNOWN_CODE = 2 };

template <class Body>
static inline int with_status(Body body) {
    try {
        body();
        return DONE;
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    } catch (const UnknownCode&) {
        return UNKNOWN_CODE;
    }
}

}  // namespace fastsde
