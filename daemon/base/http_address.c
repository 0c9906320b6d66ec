#define _GNU_SOURCE
#include "http_address.h"

#include "plain_text.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define BETWEEN ", \t"

/* Takes "HOST:PORT" apart; an IPv6 address is in brackets, which don't come along. False: HOST is
 * empty or too long. *port 0: there is none; above 65535: it is none. */
static bool split(const char *text, size_t length, char *host, size_t host_bytes, bool *six,
                  uint32_t *port)
{
    const char *end = text + length, *stop;
    *six = length > 0 && text[0] == '[';
    text += *six;
    stop = memchr(text, *six ? ']' : ':', (size_t)(end - text));
    if (stop == NULL && *six)
        return false;
    stop = stop == NULL ? end : stop;
    size_t bytes = (size_t)(stop - text);
    if (bytes == 0 || bytes >= host_bytes)
        return false;
    memcpy(host, text, bytes);
    host[bytes] = '\0';
    stop += *six;
    *port = 0;
    if (stop == end)
        return true;
    const char *digits = stop + 1;
    size_t count = (size_t)(end - digits);
    if (*stop != ':' || count == 0 || count > 5 || strspn(digits, "0123456789") < count)
        *port = UINT32_MAX;
    else
        *port = (uint32_t)strtoul(digits, NULL, 10);
    if (*port == 0)
        *port = UINT32_MAX;
    return true;
}

bool ts_http_address_parse(const char *text, ts_http_address *out)
{
    char host[64];
    bool six;
    uint32_t port;
    if (!split(text, strlen(text), host, sizeof host, &six, &port) || port == 0 || port > 65535)
        return false;
    *out = (ts_http_address){0};
    struct sockaddr_in *v4 = (struct sockaddr_in *)&out->socket;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&out->socket;
    if (six) {
        *v6 = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
        out->bytes = sizeof *v6;
        return inet_pton(AF_INET6, host, &v6->sin6_addr) == 1;
    }
    *v4 = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    out->bytes = sizeof *v4;
    return inet_pton(AF_INET, strcasecmp(host, "localhost") == 0 ? "127.0.0.1" : host,
                     &v4->sin_addr) == 1;
}

bool ts_http_address_is_loopback(const ts_http_address *a)
{
    if (a->socket.ss_family == AF_INET6)
        return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)&a->socket)->sin6_addr);
    return ntohl(((const struct sockaddr_in *)&a->socket)->sin_addr.s_addr) >> 24 == 127;
}

/* The next host of the list, and where to go on; NULL: there is none. */
static const char *next_host(const char **list, size_t *length)
{
    const char *host = *list + strspn(*list, BETWEEN);
    *length = strcspn(host, BETWEEN);
    *list = host + *length;
    return *length > 0 ? host : NULL;
}

bool ts_http_hosts_parse(const char *hosts, char *why, size_t why_bytes)
{
    static const char letters[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_";
    size_t length;
    for (const char *entry; (entry = next_host(&hosts, &length)) != NULL;) {
        char name[256], shown[300];
        bool six;
        uint32_t port;
        if (!split(entry, length, name, sizeof name, &six, &port) || port > 65535 || six ||
            strspn(name, letters) != strlen(name)) {
            snprintf(name, sizeof name, "%.*s", (int)(length < 64 ? length : 64), entry);
            snprintf(why, why_bytes, "'%s' is no host's name, with or without :PORT",
                     ts_text_escape(name, shown, sizeof shown));
            return false;
        }
    }
    return true;
}

bool ts_http_host_allowed(const char *host, const char *hosts)
{
    char asked[256], name[256];
    unsigned char address[16];
    bool six;
    uint32_t asked_port, port;
    size_t length;
    if (!split(host, strlen(host), asked, sizeof asked, &six, &asked_port) || asked_port > 65535)
        return false;
    if (six || strcasecmp(asked, "localhost") == 0 || inet_pton(AF_INET, asked, address) == 1)
        return !six || inet_pton(AF_INET6, asked, address) == 1;
    for (const char *entry; (entry = next_host(&hosts, &length)) != NULL;)
        if (split(entry, length, name, sizeof name, &six, &port) && strcasecmp(name, asked) == 0 &&
            (port == 0 || port == asked_port))
            return true;
    return false;
}
