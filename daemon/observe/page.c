/* The page as it lies in page.html, inside the program. */
#include "page.h"

#include <stdlib.h>
#include <string.h>

extern const char ts_page_text[], ts_page_end[];

__asm__(".pushsection .rodata\n"
        ".global ts_page_text, ts_page_end\n"
        "ts_page_text:\n"
        ".incbin \"page.html\"\n"
        "ts_page_end:\n"
        ".byte 0\n"
        ".popsection\n");

char *ts_page_with(const char *nonce)
{
    static const char place[] = TS_PAGE_NONCE;
    const size_t length = sizeof place - 1;
    char *text = malloc((size_t)(ts_page_end - ts_page_text) + 1);
    if (text == NULL || strlen(nonce) != length) {
        free(text);
        return NULL;
    }
    memcpy(text, ts_page_text, (size_t)(ts_page_end - ts_page_text) + 1);
    for (char *at = text; (at = strstr(at, place)) != NULL; at += length)
        memcpy(at, nonce, length);
    return text;
}
