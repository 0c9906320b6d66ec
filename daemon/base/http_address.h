/*
 * Where HTTP is served, and by which names it may be asked for. A page elsewhere that has a browser
 * ask for the daemon (DNS rebinding) names a host of its own: such a request is refused. An address
 * instead of a name can't be made to lead elsewhere, and neither can localhost.
 */
#ifndef TS_HTTP_ADDRESS_H
#define TS_HTTP_ADDRESS_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/socket.h>

typedef struct ts_http_address {
    struct sockaddr_storage socket;
    socklen_t bytes;
} ts_http_address;

/* "127.0.0.1:9470", "0.0.0.0:9470", "[::1]:9470", "localhost:9470" (which is 127.0.0.1); no other
 * names. False: it is something else. */
bool ts_http_address_parse(const char *text, ts_http_address *out);

/* Whether only this machine reaches it. */
bool ts_http_address_is_loopback(const ts_http_address *address);

/* Whether `hosts` is names, each perhaps with :PORT, with commas or blanks between them; a sentence
 * if not. */
bool ts_http_hosts_parse(const char *hosts, char *why, size_t why_bytes);

/* Whether a request's Host header may be answered: localhost, an address, or one of `hosts`; of one
 * that is listed without a port, any port. */
bool ts_http_host_allowed(const char *host, const char *hosts);

#endif
