# As much of NixOS as the module uses.
{ lib, nix }:
let
  inherit (lib.types)
    anything
    attrsOf
    bool
    enum
    int
    listOf
    nullOr
    str
    submodule
    ;
in
{
  options =
    let
      option = type: default: lib.mkOption { inherit type default; };
      # Whatever else it has, too.
      withOptions =
        options:
        submodule {
          freeformType = anything;
          inherit options;
        };
    in
    {
      assertions = option (listOf anything) [ ];
      networking.firewall.allowedTCPPorts = option (listOf anything) [ ];
      networking.proxy.envVars = option anything { };
      nix.buildMachines = option (listOf (submodule {
        options = {
          hostName = lib.mkOption { type = str; };
          protocol = option (enum [
            "ssh"
            "ssh-ng"
          ]) "ssh";
          systems = option (listOf str) [ ];
          maxJobs = option int 1;
          speedFactor = option int 1;
          supportedFeatures = option (listOf str) [ ];
          mandatoryFeatures = option (listOf str) [ ];
        };
      })) [ ];
      nix.distributedBuilds = option bool false;
      nix.enable = option bool true;
      nix.package = option anything nix;
      nix.settings = option (attrsOf anything) { };
      services.nginx.enable = option bool false;
      services.nginx.virtualHosts = option (attrsOf (withOptions {
        enableACME = option bool false;
        useACMEHost = option (nullOr str) null;
      })) { };
      systemd.mounts = option (listOf anything) [ ];
      systemd.packages = option (listOf anything) [ ];
      systemd.services = option (attrsOf (withOptions {
        enable = option bool true;
        overrideStrategy = option str "asDropinIfExists";
      })) { };
      systemd.sockets = option (attrsOf anything) { };
      systemd.targets = option (attrsOf anything) { };
      systemd.tmpfiles.rules = option (listOf str) [ ];
      users.groups = option (attrsOf anything) { };
      users.users = option (attrsOf anything) { };
      warnings = option (listOf str) [ ];
    };
}
