# As much of NixOS as the module uses.
{ lib, nix }:
let
  inherit (lib.types)
    anything
    attrsOf
    bool
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
      systemd.tmpfiles.rules = option (listOf str) [ ];
      users.groups = option (attrsOf anything) { };
      users.users = option (attrsOf anything) { };
      warnings = option (listOf str) [ ];
    };
}
