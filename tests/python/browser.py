"""A headless Chromium that is told what to do through two pipes, by the DevTools protocol."""

import json
import os
import subprocess


class Browser:
    """One page. Used with `with`."""

    def __init__(self, chromium, profile):
        commands, to = os.pipe()
        come, answers = os.pipe()

        def pipes():  # Chromium reads from descriptor 3 and writes to 4
            low, high = os.dup(commands), os.dup(answers)
            os.dup2(low, 3)
            os.dup2(high, 4)

        self.process = subprocess.Popen(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            close_fds=False, preexec_fn=pipes)
        os.close(commands)
        os.close(answers)
        self.to, self.come = os.fdopen(to, "wb", 0), os.fdopen(come, "rb", 0)
        self.rest, self.number, self.session, self.events = b"", 0, None, []

    def __enter__(self):
        pages = [t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self.session = self.ask("Target.attachToTarget", targetId=pages[0]["targetId"],
                                flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Accessibility"):
            self.ask(domain + ".enable")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.to.close()
        self.come.close()

    def read(self):
        while b"\0" not in self.rest:
            more = self.come.read(1 << 16)
            if not more:
                raise EOFError("the browser has ended")
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def ask(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url):
        self.ask("Page.navigate", url=url)

    def run(self, script):
        """The value of an expression; a promise is awaited."""
        answer = self.ask("Runtime.evaluate", expression=script, awaitPromise=True,
                          returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, condition):
        """Waits until an expression is true, a minute at most; fails with what it threw last."""
        script = """new Promise((done, fail) => {
            let thrown = null;
            const last = Date.now() + 60000, look = () => {
                try { if (CONDITION) return done(); } catch (e) { thrown = e; }
                if (Date.now() > last) return fail(new Error(`not true after 60 s: ${thrown}`));
                setTimeout(look, 20);
            };
            look();
        })"""
        self.run(script.replace("CONDITION", condition))

    def press(self, key):
        code = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "ArrowUp": 38, "Escape": 27,
                "Tab": 9}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                     windowsVirtualKeyCode=code)

    def accessible(self):
        """What a screen reader is given: (role, name) of everything that isn't hidden from it."""
        nodes = self.ask("Accessibility.getFullAXTree")["nodes"]
        return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes
                if not n["ignored"]]
