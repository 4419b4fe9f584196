"""What a benchmark says about the machine that it ran on."""

import platform
import subprocess


def processor() -> str:
    """Return the processor's name where the system tells it."""
    output = (
        subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
        if platform.system() == "Linux"
        else ""
    )
    names = [line.split(":", 1)[1].strip() for line in output.splitlines() if line.startswith("Model name")]
    return " ".join(names) or platform.machine()
