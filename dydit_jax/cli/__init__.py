"""The commands: each defines its flags and calls one job. Installed, they are dydit-train, dydit-sample and so on."""
