# services.nix-relay-client: a machine whose builds run behind a relay. Elsewhere it is as README.md has it under "As one
# of the builders".
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.nix-relay-client;
  option =
    type: default: description:
    mkOption { inherit type default description; };

  variables = lib.filterAttrs (_: value: value != null) (
    {
      # With those of security.pki.
      SSL_CERT_FILE = "/etc/ssl/certs/ca-certificates.crt";
      NIX_RELAY_AUDIENCE = cfg.audience;
    }
    // cfg.environment
    // {
      NIX_RELAY_URL = cfg.url;
      NIX_RELAY_TOKEN_COMMAND =
        if cfg.tokenFile == null then cfg.tokenCommand else "cat ${lib.escapeShellArg cfg.tokenFile}";
    }
  );
  # What Nix runs in place of ssh. As it brings the variables along, nix-daemon goes on when they change, and no unit
  # has to quote them.
  builder = pkgs.writeShellScript "nix-relay-builder" ''
    export ${lib.escapeShellArgs (lib.mapAttrsToList (name: value: "${name}=${value}") variables)}
    ${builtins.readFile ../.github/actions/client/messages}
    exec ${lib.getExe cfg.package} "$@"
  '';
in
{
  options.services.nix-relay-client = {
    enable = lib.mkEnableOption "nix-relay's client, by which Nix on this machine builds behind a relay";
    package = lib.mkPackageOption (import ./. { inherit pkgs; }) "nix-relay" { };
    url = mkOption {
      type = types.strMatching "wss?://[^[:space:]]+";
      example = "wss://relay.example.com";
      description = "Where the relay is; `/relay` is added if there is no path.";
    };
    tokenFile = option (types.nullOr (types.strMatching "/.+")) null ''
      A file that holds a token. It is read for each session, by root, and something else must keep the token fresh.
    '';
    tokenCommand = option (types.nullOr types.str) null ''
      What prints a token, in place of `tokenFile`: `sh -c` runs it for each session, as root. Its PATH has coreutils;
      name other programs as `''${lib.getExe pkgs.curl}`. Everybody on this machine can read the command, so it must read
      secrets from files.
    '';
    audience = option (types.nullOr types.str) null "What `tokenCommand` finds as NIX_RELAY_AUDIENCE.";
    environment = option (types.attrsOf types.str) { } ''
      More of the client's variables, such as NIX_RELAY_RETRY_SECS. Everybody on this machine can read them.
    '';
    systems = mkOption {
      type = types.listOf types.str;
      default = [ pkgs.stdenv.hostPlatform.system ];
      defaultText = lib.literalExpression "[ pkgs.stdenv.hostPlatform.system ]";
      description = "The systems that the relay's machine builds for.";
    };
    maxJobs = option types.ints.positive 4 "How many builds may run there at once.";
    speedFactor = option types.ints.positive 1 "How fast it is beside others of `nix.buildMachines`.";
    supportedFeatures = option (types.listOf types.str) [
      "benchmark"
      "big-parallel"
      "nixos-test"
    ] "The system features that it has.";
    mandatoryFeatures =
      option (types.listOf types.str) [ ]
        "Those that a derivation must require to be built there.";
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = (cfg.tokenFile == null) != (cfg.tokenCommand == null);
        message = "nix-relay's client needs one source of tokens: set either services.nix-relay-client.tokenFile or services.nix-relay-client.tokenCommand.";
      }
      {
        assertion = cfg.tokenFile == null || builtins.match "${builtins.storeDir}/.*" cfg.tokenFile == null;
        message = "Everybody on this machine can read what is in the store: set services.nix-relay-client.tokenFile to a file elsewhere, such as \"/run/keys/nix-relay\".";
      }
      {
        assertion = builtins.all (name: !cfg.environment ? ${name}) [
          "ACTIONS_ID_TOKEN_REQUEST_TOKEN"
          "CIRCLE_OIDC_TOKEN_V2"
          "GITLAB_OIDC_TOKEN"
          "NIX_RELAY_TOKEN"
        ];
        message = "Everybody on this machine could read the token in services.nix-relay-client.environment: set services.nix-relay-client.tokenFile to a file that has it.";
      }
      {
        assertion = config.nix.enable;
        message = "nix.enable is false, so NixOS does not configure the Nix that would use services.nix-relay-client: set nix.enable to true, or have that Nix's own nix.conf say what README.md of nix-relay has under \"As one of the builders\".";
      }
    ];

    nix.distributedBuilds = true;
    nix.settings.builders-use-substitutes = true;
    nix.buildMachines = [
      {
        inherit (cfg)
          systems
          maxJobs
          speedFactor
          supportedFeatures
          mandatoryFeatures
          ;
        protocol = "ssh-ng";
        hostName = "localhost?remote-program=${builder}";
      }
    ];
    # By their names, the client runs `sh` for the command, and Nix 2.8 `bash` for a remote-program.
    systemd.services.nix-daemon.path = [ pkgs.bash ];
  };
}
