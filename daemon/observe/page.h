/* The page at / (page.html): it asks for /stats.json (stats.h) every second and draws it. */
#ifndef TS_PAGE_H
#define TS_PAGE_H

/* What stands in page.html for the nonce that lets its script and style run. */
#define TS_PAGE_NONCE "00000000000000000000000000000000"

/* The page with a nonce of as many characters, to be freed; NULL: no memory. Any thread. */
char *ts_page_with(const char *nonce);

#endif
