# services.nix-relay: the unit that the package brings, and what the rest of the machine must know of it.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.nix-relay;
  toml = pkgs.formats.toml { };

  # What this repository says of each key has the defaults of the binary.
  defaults = lib.importTOML ../config.example.toml;
  keys =
    table: lib.mapAttrs (name: option: mkOption ({ default = defaults.${table}.${name}; } // option));
  seconds = description: {
    type = types.ints.unsigned;
    inherit description;
  };
  # Where 0 would be none at all.
  seconds' = description: {
    type = types.ints.positive;
    inherit description;
  };
  # For what a rule need not say.
  perhaps =
    type: description:
    mkOption {
      type = types.nullOr type;
      default = null;
      inherit description;
    };

  inherit (cfg.settings.server) listen admin_listen;
  # Host and port; null if it is not that.
  parse =
    text:
    let
      parts = builtins.match "(.+):0*([1-9][0-9]{0,4})" text;
    in
    if parts == null || port parts > 65535 then null else parts;
  port = parts: lib.toInt (lib.last parts);
  address = parse listen;
  # Only root may listen there.
  isReserved = parts: parts != null && port parts < 1024;
  isLocal =
    address != null && builtins.match "127\\..*|localhost|\\[::1]" (builtins.head address) != null;
  # A socket unit takes addresses alone, as systemd looks up no names.
  isNumeric =
    address != null && builtins.match "[0-9.]+|\\[[0-9a-fA-F:.]+]" (builtins.head address) != null;

  # TOML has no null.
  isSet = _: value: value != null;
  written = lib.filterAttrsRecursive isSet (
    lib.recursiveUpdate cfg.settings { auth.rule = map (lib.filterAttrs isSet) cfg.settings.auth.rule; }
  );

  claim = types.oneOf [
    types.str
    types.int
    types.bool
  ];

  # Whom nix-daemon trusts; what is no list may be a text.
  trusted = lib.concatMap (name: lib.toList (config.nix.settings.${name} or [ ])) [
    "trusted-users"
    "extra-trusted-users"
  ];

  roots = "/nix/var/nix/gcroots/nix-relay";
  keep = pkgs.writeShellScript "nix-relay-keep" ''
    ${pkgs.coreutils}/bin/mkdir -p ${roots}
    for path in $OUT_PATHS; do
      ${pkgs.coreutils}/bin/ln -sfn "$path" "${roots}/''${path##*/}"
    done
  '';

  # If relays take turns, the unit is a template, and each configuration has an instance.
  unit = "nix-relay${lib.optionalString cfg.takeTurns "@"}";
  service = config.systemd.services.${unit};
  instance = "${unit}${
    builtins.substring 0 12 (
      builtins.hashString "sha256" (builtins.toJSON { inherit (service) environment serviceConfig; })
    )
  }.service";
  units = pkgs.runCommandLocal "nix-relay-units" { } ''
    mkdir -p $out/lib/systemd/system
    cd ${cfg.package}/lib/systemd/system
    cp nix-relay.socket $out/lib/systemd/system/
    cp nix-relay.service $out/lib/systemd/system/nix-relay@.service
  '';
  retire = pkgs.writeShellScript "nix-relay-retire" ''
    PATH=${pkgs.systemd}/bin
    systemctl list-units --plain --no-legend 'nix-relay@*.service' | while read -r unit _; do
      [ "$unit" = "$1" ] || systemctl stop --no-block "$unit"
    done
  '';

  configFile =
    pkgs.runCommand "nix-relay.toml"
      {
        written = toml.generate "nix-relay.toml" written;
        # What cannot run here checks it when it starts.
        check = lib.optionalString (pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform) (
          lib.getExe cfg.package
        );
      }
      ''
        if [ "$check" ]; then "$check" --check "$written"; fi
        cp "$written" "$out"
      '';
in
{
  imports = [ ./stores.nix ];

  options.services.nix-relay = {
    enable = lib.mkEnableOption "nix-relay, through which CI jobs that hold an OIDC token build on this machine";

    # Where nixpkgs has it, `pkgs` is the first argument.
    package = lib.mkPackageOption (import ./. { inherit pkgs; }) "nix-relay" { };

    settings = mkOption {
      description = ''
        The configuration file. It is checked when the system is built. README.md of nix-relay and config.example.toml
        say more of each key.
      '';
      example = {
        auth.allowed_org = "your-organisation";
        daemon.max_connections = 64;
      };
      default = { };
      type = types.submodule {
        freeformType = toml.type;
        options.server = keys "server" {
          listen = {
            type = types.str;
            default = if cfg.nginx.enable then "127.0.0.1:8080" else defaults.server.listen;
            defaultText = lib.literalMD "`\"0.0.0.0:8080\"`, or `\"127.0.0.1:8080\"` with nginx";
            example = "[::]:8080";
            description = "Address or host name, and port.";
          };
          admin_listen = {
            type = types.str;
            example = "127.0.0.1:9090";
            description = "Address and port of `/healthz` and `/metrics`; empty for none.";
          };
          shutdown_grace_secs = seconds "How long running sessions may go on after SIGTERM." // {
            default =
              if cfg.takeTurns then cfg.settings.daemon.timeout_secs else defaults.server.shutdown_grace_secs;
            defaultText = lib.literalMD "`30`, or `daemon.timeout_secs` with `takeTurns`";
          };
          handshake_timeout_secs = seconds' "How long a client may take to send its request.";
          keepalive_secs = seconds "Seconds between pings; 0 for none.";
        };
        options.auth = keys "auth" {
          issuer = {
            type = types.str;
            example = "https://gitlab.example.com";
            description = "Whose tokens count: exactly their `iss`.";
          };
          audience = {
            type = types.str;
            default = if cfg.nginx.enable then "https://${cfg.nginx.domain}" else defaults.auth.audience;
            defaultText = lib.literalMD "`\"api://nix-relay\"`, or `https://` and the domain with nginx";
            example = "https://relay.example.com";
            description = "What the `aud` of the tokens must be.";
          };
          allowed_org = {
            type = types.str;
            example = "your-organisation";
            description = "Whose jobs may build here: the `repository_owner` of their tokens, letter case aside.";
          };
          jwks_cache_ttl_secs = seconds' "How long an issuer's keys are used before they are fetched again.";
          jwks_files = {
            type = types.attrsOf types.path;
            default = { };
            example."https://kubernetes.default.svc" = "/etc/nix-relay/kubernetes.json";
            description = ''
              Files with the keys of issuers from which the relay cannot fetch them. A path of Nix, such as
              `./kubernetes.json`, is there when the system is built. Without one that is given as text, the relay does
              not start; it tries again every five seconds.
            '';
          };
          rule = {
            description = "Who else may; the first rule that matches decides.";
            default = [ ];
            type = types.listOf (
              types.submodule {
                freeformType = toml.type;
                options.name = mkOption {
                  type = types.str;
                  example = "main";
                  description = "What the log calls it.";
                };
                options.issuer = perhaps types.str "Whose tokens; `auth.issuer`, if left out.";
                options.audience = perhaps types.str "Their `aud`; `auth.audience`, if left out.";
                options.bound_claims = mkOption {
                  type = types.attrsOf (types.either claim (types.listOf claim));
                  default = { };
                  example = {
                    namespace_path = "group";
                    ref = [
                      "main"
                      "release-*"
                    ];
                  };
                  description = "What the claims of a token must be, all of them; nix/providers.md has patterns.";
                };
                options.extra_args = perhaps (types.listOf types.str) "nix-daemon's arguments; `daemon.extra_args`, if left out.";
                options.max_connections = perhaps types.ints.positive "How many sessions those whom it lets in may have at once.";
              }
            );
          };
        };
        options.daemon = keys "daemon" {
          nix_daemon_path = {
            type = types.str;
            default = lib.getExe' config.nix.package "nix-daemon";
            defaultText = lib.literalExpression "lib.getExe' config.nix.package \"nix-daemon\"";
            description = "The program that each session gets.";
          };
          extra_args = {
            type = types.listOf types.str;
            description = "Its arguments.";
          };
          timeout_secs = seconds' "The longest session.";
          max_connections = {
            type = types.ints.positive;
            description = "How many sessions there may be at once; operating.md says how to choose it.";
          };
          queue_timeout_secs = {
            type = types.ints.between 0 30;
            description = "How long a client may wait for a session to end, before it is told that all are in use and asks again.";
          };
        };
      };
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether the firewall lets the port of `settings.server.listen` be reached, where tokens arrive unencrypted.
      '';
    };

    socketActivation = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether systemd holds the port, so that connections wait while the relay restarts, and none is refused. Once
        `settings.server.listen` has changed, this takes `systemctl restart nix-relay.socket`: NixOS leaves a socket that
        is in use as it is.
      '';
    };

    takeTurns = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether a switch ends no session: it starts a relay beside the old one, which goes on until its last session has
        ended. Both have the socket of `socketActivation`. Meanwhile each counts its own `daemon.max_connections`, and
        has its own `MemoryMax`. The unit is a template, so its settings are those of `systemd.services."nix-relay@"`.
      '';
    };

    trustClients = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether nix-daemon trusts the clients of the relay as it does `nix.settings.trusted-users`. They may then add
        store paths that nobody signed, and can become root on this machine.
      '';
    };

    keepResults = mkOption {
      type = types.nullOr types.ints.positive;
      default = null;
      example = 7;
      description = ''
        For how many days what has been built on this machine, by whomever, is a root of the garbage collector; null
        lets the next `nix.gc.automatic`, or any client's `nix store gc`, take it. It is kept by Nix's
        `post-build-hook`, of which there can be only one, and dropped by systemd-tmpfiles.
      '';
    };

    nginx.enable = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether nginx does TLS for the relay, which then listens on loopback. The certificate is ACME's unless
        `services.nginx.virtualHosts.<domain>` has `useACMEHost`, or `enableACME = false` and one of its own. That is
        also where locations beside `/relay` may be added; without one, all else is 404.
      '';
    };

    nginx.domain = mkOption {
      type = types.str;
      example = "relay.example.com";
      description = "The name by which clients reach the relay.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = cfg.settings.auth.allowed_org != "" || cfg.settings.auth.rule != [ ];
        message = "Nobody could connect to nix-relay: set services.nix-relay.settings.auth.allowed_org to the organisation whose jobs may, or services.nix-relay.settings.auth.rule.";
      }
      {
        assertion = builtins.all (rule: rule.bound_claims != { }) cfg.settings.auth.rule;
        message = "A rule of nix-relay would let everybody in: set bound_claims in each of services.nix-relay.settings.auth.rule.";
      }
      {
        assertion = address != null;
        message = "nix-relay cannot listen on \"${listen}\": set services.nix-relay.settings.server.listen to HOST:PORT or [IPV6]:PORT.";
      }
      {
        assertion = isReserved address -> cfg.socketActivation;
        message = "nix-relay is not root, and cannot listen on ${listen}, a port below 1024, by itself: set services.nix-relay.socketActivation to true, or services.nix-relay.settings.server.listen to another port.";
      }
      {
        assertion = !isReserved (parse admin_listen);
        message = "nix-relay is not root, and cannot listen on ${admin_listen}, a port below 1024: set services.nix-relay.settings.server.admin_listen to another port.";
      }
      {
        assertion = cfg.openFirewall -> !isLocal;
        message = "services.nix-relay.openFirewall is of no use while only this machine reaches ${listen}: set services.nix-relay.settings.server.listen to another address, or with nginx set networking.firewall.allowedTCPPorts = [ 80 443 ] instead.";
      }
      {
        assertion = cfg.nginx.enable -> isLocal;
        message = "With services.nix-relay.nginx.enable, tokens need not pass ${listen} unencrypted: set services.nix-relay.settings.server.listen to an address of loopback, or not at all.";
      }
      {
        assertion = cfg.socketActivation -> isNumeric;
        message = "systemd cannot listen on the name in \"${listen}\" for nix-relay: set services.nix-relay.settings.server.listen to an IP address and port, or services.nix-relay.socketActivation to false.";
      }
      {
        assertion = cfg.takeTurns -> cfg.socketActivation;
        message = "Only a socket of systemd's can be that of two relays: with services.nix-relay.takeTurns, set services.nix-relay.socketActivation to true.";
      }
      {
        assertion = cfg.takeTurns -> admin_listen == "";
        message = "Two relays cannot both listen on ${admin_listen}: set services.nix-relay.settings.server.admin_listen to \"\", or services.nix-relay.takeTurns to false.";
      }
    ];
    warnings =
      lib.optional (cfg.openFirewall && !isLocal)
        "services.nix-relay.openFirewall lets others reach ${listen}, where tokens arrive unencrypted and whoever reads one can use it: set services.nix-relay.nginx.enable instead, unless something else on the way does TLS and nobody else is in that network."
      ++
        lib.optional (!cfg.trustClients && builtins.any (user: user == "*" || user == "nix-relay") trusted)
          "nix.settings.trusted-users has \"*\" or \"nix-relay\", so whoever comes through nix-relay can become root: name the users there, or set services.nix-relay.trustClients to say that this is meant."
      ++
        lib.optional (!config.nix.enable)
          "nix.enable is false, so NixOS starts no nix-daemon for nix-relay and does not allow it to use one: see to it that one runs, that its allowed-users has nix-relay, and that services.nix-relay.settings.daemon.nix_daemon_path is its program.";

    users.users.nix-relay = {
      isSystemUser = true;
      group = "nix-relay";
    };
    users.groups.nix-relay = { };
    nix.settings.extra-allowed-users = [ "nix-relay" ];
    nix.settings.extra-trusted-users = lib.mkIf cfg.trustClients [ "nix-relay" ];

    # Of a link, only the time when it was made says how old it is: the garbage collector reads it.
    nix.settings.post-build-hook = lib.mkIf (cfg.keepResults != null) keep;
    systemd.tmpfiles.rules = lib.mkIf (cfg.keepResults != null) [
      "d ${roots} 0755 root root m:${toString cfg.keepResults}d"
    ];

    # The units of the package, with what is different here; all else is said there. Without `asDropin`, NixOS would
    # make a unit of this alone where the package brings none, and run the relay without what protects the machine. But
    # a drop-in masks no unit.
    systemd.packages = [ (if cfg.takeTurns then units else cfg.package) ];
    systemd.targets.multi-user.wants = lib.mkIf cfg.takeTurns [ instance ];
    systemd.services.${unit} = {
      overrideStrategy = if service.enable then "asDropin" else "asDropinIfExists";
      wantedBy = lib.mkIf (!cfg.takeTurns) [ "multi-user.target" ];
      restartIfChanged = lib.mkIf cfg.takeTurns false;
      requires = lib.mkIf cfg.socketActivation [ "nix-relay.socket" ];
      # At a switch, the old relay goes on until the new one can start.
      stopIfChanged = false;
      environment = lib.mapAttrs (_: lib.mkDefault) (
        config.networking.proxy.envVars
        // {
          # With those of security.pki.
          SSL_CERT_FILE = "/etc/ssl/certs/ca-certificates.crt";
        }
      );
      serviceConfig = {
        ExecStart = [
          ""
          "${lib.getExe cfg.package} ${configFile}"
        ];
        # Once the new relay is ready, the old ones hear that they are to stop; nobody waits for them.
        ExecStartPost = lib.mkIf cfg.takeTurns "-+${retire} %n";
        Sockets = lib.mkIf cfg.takeTurns "nix-relay.socket";
        # As the package has it; so that it can be asked for here.
        User = "nix-relay";
        # The configuration was checked, so what is wrong is something that may yet come, such as a file of keys.
        RestartPreventExitStatus = "";
        # After the grace, sessions have 19 seconds to end.
        TimeoutStopSec = lib.mkDefault (cfg.settings.server.shutdown_grace_secs + 30);
      };
    };
    systemd.sockets.nix-relay = lib.mkIf cfg.socketActivation {
      overrideStrategy = "asDropin";
      wantedBy = [ "sockets.target" ];
      socketConfig.ListenStream = [
        ""
        listen
      ];
      socketConfig.Service = lib.mkIf cfg.takeTurns instance;
    };

    networking.firewall.allowedTCPPorts = lib.mkIf (cfg.openFirewall && address != null) [
      (port address)
    ];

    services.nginx = lib.mkIf cfg.nginx.enable {
      enable = true;
      virtualHosts.${cfg.nginx.domain} = {
        enableACME = lib.mkDefault (
          config.services.nginx.virtualHosts.${cfg.nginx.domain}.useACMEHost == null
        );
        forceSSL = lib.mkDefault true;
        # Tokens may be long.
        extraConfig = "large_client_header_buffers 4 16k;";
        # All of it gives way to one of the operator's own.
        locations."/" = lib.mkDefault { return = "404"; };
        locations."= /relay" = {
          proxyPass = "http://${listen}";
          proxyWebsockets = true;
          # They would have the relay believe where a client says that it comes from.
          recommendedProxySettings = false;
          # The longest session, and the wait before it.
          extraConfig =
            let
              inherit (cfg.settings.daemon) timeout_secs queue_timeout_secs;
              seconds = toString (timeout_secs + queue_timeout_secs + 60);
            in
            ''
              proxy_set_header X-Forwarded-For $remote_addr;
              proxy_buffer_size 64k;
              proxy_buffers 8 64k;
              proxy_read_timeout ${seconds}s;
              proxy_send_timeout ${seconds}s;
              send_timeout ${seconds}s;
            '';
        };
      };
    };
  };
}
